//! Owns a page's form as one HTML file: style and pictures are inside, scripts and references are not.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::Block;

const STYLE: &str = "\
body { font: 16px/1.45 sans-serif; max-width: 68em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: left; white-space: nowrap }
td:nth-child(n+2) { font-variant-numeric: tabular-nums }
pre { background: #f4f4f4; padding: .6em 1em; overflow-x: auto; white-space: pre-wrap }
figure { margin: 1.5em 0 } svg { max-width: 100%; height: auto } figcaption { font-size: 14px; color: #555 }";

pub(super) fn render(blocks: &[Block]) -> String {
    let title = blocks.iter().find_map(|block| match block {
        Block::Title(title) => Some(title.as_str()),
        Block::Heading(_)
        | Block::Paragraph(_)
        | Block::List(_)
        | Block::Code(_)
        | Block::Table { .. }
        | Block::Figure { .. } => None,
    });
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                title { (title.unwrap_or_default()) }
                style { (PreEscaped(STYLE)) }
            }
            body { @for block in blocks { (render_block(block)) } }
        }
    };
    page.into_string()
}

fn render_block(block: &Block) -> Markup {
    match block {
        Block::Title(text) => html! { h1 { (text) } },
        Block::Heading(text) => html! { h2 { (text) } },
        Block::Paragraph(text) => html! { p { (text) } },
        Block::Code(text) => html! { pre { (text) } },
        Block::List(lines) => html! { ul { @for line in lines { li { (line) } } } },
        Block::Table { head, rows } => html! {
            table {
                thead { tr { @for cell in head { th { (cell) } } } }
                tbody { @for row in rows { tr { @for cell in row { td { (cell) } } } } }
            }
        },
        // Drawn by this program, which escapes the names in it.
        Block::Figure { caption, svg } => html! {
            figure { (PreEscaped(svg)) figcaption { (caption) } }
        },
    }
}
