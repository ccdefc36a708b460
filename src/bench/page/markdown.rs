//! Owns a page's form as Markdown. Pictures are left out: they are in the HTML.

use super::Block;

pub(super) fn render(blocks: &[Block]) -> String {
    let mut text = String::new();
    for block in blocks {
        let piece = match block {
            Block::Title(title) => format!("# {}\n", plain(title)),
            Block::Heading(heading) => format!("## {}\n", plain(heading)),
            Block::Paragraph(paragraph) => format!("{}\n", plain(paragraph)),
            Block::List(lines) => lines
                .iter()
                .map(|line| format!("- {}\n", plain(line)))
                .collect(),
            // Indented code needs no fence that its text could close.
            Block::Code(code) => code.lines().map(|line| format!("    {line}\n")).collect(),
            Block::Table { head, rows } => {
                let rule = format!("|{}\n", "---|".repeat(head.len()));
                let rows: String = rows.iter().map(|cells| row(cells)).collect();
                format!("{}{rule}{rows}", row(head))
            }
            Block::Figure { .. } => continue,
        };
        text.push_str(&piece);
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

fn row(cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| plain(cell)).collect();
    format!("| {} |\n", cells.join(" | "))
}

/// Keeps a line one line, a cell one cell, and names from files free of markup.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '|' | '<' | '*' | '`' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_cannot_leave_its_cell() {
        let block = Block::Table {
            head: vec!["a".to_owned()],
            rows: vec![vec!["x | y\nz <b>".to_owned()]],
        };
        assert_eq!(render(&[block]), "| a |\n|---|\n| x \\| y z \\<b> |\n");
    }
}
