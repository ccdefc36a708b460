//! Owns drawing: grouped bars with their spread, as SVG. Pure.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Error;
use super::stats::Summary;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 340;
/// One line of the legend, which is above the bars.
const LEGEND: i32 = 24;
/// Where the legend begins.
const LEFT: i32 = 70;
/// Below the bars, for the names of the groups.
const NAMES: u32 = 26;
const FONT: &str = "sans-serif";
/// Distinguishable also for people who do not see all colours (Okabe and Ito), then greys.
const COLOURS: [RGBColor; 12] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(240, 228, 66),
    RGBColor(90, 90, 90),
    RGBColor(170, 170, 170),
    RGBColor(120, 94, 240),
    RGBColor(140, 86, 50),
    RGBColor(30, 30, 30),
];

/// What is drawn: for each group a bar of each series that has one.
#[derive(Clone, Debug, Default)]
pub struct Bars {
    /// The scale's unit.
    pub unit: String,
    /// The names of the series, for the legend.
    pub series: Vec<String>,
    /// The groups, and in each a value for every series that has one.
    pub groups: Vec<(String, Vec<Option<Summary>>)>,
}

impl Bars {
    /// Draws them: bars to the median, lines from the smallest to the largest.
    ///
    /// # Errors
    /// [`Error::Plot`] if the library cannot.
    pub fn draw(&self) -> Result<String, Error> {
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
            self.draw_on(&root)
                .and_then(|()| root.present().map_err(|error| error.to_string()))
                .map_err(|reason| Error::Plot {
                    what: self.unit.clone(),
                    reason,
                })?;
        }
        Ok(svg)
    }

    fn draw_on(&self, root: &DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), String> {
        let failed = |error: DrawingAreaErrorKind<_>| error.to_string();
        root.fill(&WHITE).map_err(failed)?;
        let legend = self.draw_legend(root)?;
        let values = self.groups.iter().flat_map(|(_, bars)| bars).flatten();
        let top = values.map(|summary| summary.max).fold(0.0, f64::max);
        let top = if top > 0.0 { top * 1.05 } else { 1.0 };
        let mut chart = ChartBuilder::on(root)
            .margin_top(legend)
            .margin_bottom(NAMES)
            .margin_right(12)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..as_f64(self.groups.len().max(1)), 0.0..top)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .disable_x_axis()
            .y_desc(self.unit.as_str())
            .y_labels(6)
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 14))
            .light_line_style(WHITE)
            .draw()
            .map_err(failed)?;
        let slot = 0.86 / as_f64(self.series.len().max(1));
        let centred = |size| text(size).pos(Pos::new(HPos::Center, VPos::Top));
        for (nth, (name, bars)) in self.groups.iter().enumerate() {
            let left = as_f64(nth);
            for (series, summary) in bars.iter().enumerate() {
                let Some(summary) = summary else { continue };
                let from = left + 0.07 + slot * as_f64(series);
                let (to, middle) = (from + slot * 0.9, from + slot * 0.45);
                let bar = [(from, 0.0), (to, summary.median)];
                let whisker = vec![(middle, summary.min), (middle, summary.max)];
                chart
                    .draw_series([Rectangle::new(bar, colour(series).filled())])
                    .map_err(failed)?;
                chart
                    .draw_series([PathElement::new(whisker, BLACK.stroke_width(1))])
                    .map_err(failed)?;
            }
            let (x, y) = chart.backend_coord(&(left + 0.5, 0.0));
            root.draw(&Text::new(name.as_str(), (x, y + 6), centred(13)))
                .map_err(failed)?;
        }
        Ok(())
    }

    /// Draws the names of the series in as many lines as they need, and returns the height of those.
    fn draw_legend(&self, root: &DrawingArea<SVGBackend<'_>, Shift>) -> Result<i32, String> {
        let failed = |error: DrawingAreaErrorKind<_>| error.to_string();
        let right = i32::try_from(WIDTH).unwrap_or(i32::MAX);
        let (mut x, mut y) = (LEFT, 10);
        for (series, name) in self.series.iter().enumerate() {
            // Eight pixels are more than the mean width of a letter at this size.
            let width = 34 + 8 * i32::try_from(name.chars().count()).unwrap_or(0);
            if x > LEFT && x + width > right {
                (x, y) = (LEFT, y + LEGEND);
            }
            let square = [(x, y), (x + 12, y + 12)];
            root.draw(&Rectangle::new(square, colour(series).filled()))
                .map_err(failed)?;
            root.draw(&Text::new(name.as_str(), (x + 17, y - 2), text(14)))
                .map_err(failed)?;
            x += width;
        }
        Ok(y + LEGEND)
    }
}

fn text(size: i32) -> TextStyle<'static> {
    TextStyle::from((FONT, size).into_font()).color(&BLACK)
}

const fn colour(series: usize) -> RGBColor {
    COLOURS[series % COLOURS.len()]
}

#[expect(clippy::cast_precision_loss, reason = "a handful of groups and series")]
const fn as_f64(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(median: f64) -> Summary {
        Summary {
            median,
            min: median / 2.0,
            max: median * 2.0,
        }
    }

    #[test]
    fn there_is_a_bar_for_every_value_and_its_height_follows_the_median() {
        let bars = Bars {
            unit: "Gb/s".to_owned(),
            series: vec!["a & b".to_owned(), "loden".to_owned()],
            groups: vec![
                (
                    "tcp-1".to_owned(),
                    vec![Some(summary(2.0)), Some(summary(4.0))],
                ),
                ("tcp-8".to_owned(), vec![None, Some(summary(8.0))]),
            ],
        };
        let svg = bars.draw().unwrap();
        let tree = roxmltree::Document::parse(&svg).unwrap();
        let heights = |series: usize| -> Vec<f64> {
            let RGBColor(r, g, b) = colour(series);
            let fill = format!("#{r:02X}{g:02X}{b:02X}");
            tree.descendants()
                .filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "rect")))
                .filter(|node| node.attribute("fill") == Some(fill.as_str()))
                .map(|node| node.attribute("height").unwrap().parse().unwrap())
                // The first is the legend's.
                .skip(1)
                .collect()
        };
        assert_eq!((heights(0).len(), heights(1).len()), (1, 2));
        let (two, four, eight) = (heights(0)[0], heights(1)[0], heights(1)[1]);
        assert!((four / two - 2.0).abs() < 0.1 && (eight / two - 4.0).abs() < 0.2);
        assert!(svg.contains("a &amp; b"), "{svg}");
    }

    #[test]
    fn a_legend_that_is_too_long_for_a_line_goes_on_in_the_next() {
        let bars = Bars {
            unit: "Gb/s".to_owned(),
            series: vec!["a-rather-long-name".to_owned(); 10],
            groups: vec![("tcp-1".to_owned(), vec![Some(summary(1.0)); 10])],
        };
        let svg = bars.draw().unwrap();
        let tree = roxmltree::Document::parse(&svg).unwrap();
        let texts = tree
            .descendants()
            .filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "text")));
        let names: Vec<(f64, String)> = texts
            .filter(|node| {
                node.descendants()
                    .any(|one| one.text().is_some_and(|text| text.contains("rather")))
            })
            .map(|node| {
                (
                    node.attribute("x").unwrap().parse().unwrap(),
                    node.attribute("y").unwrap().to_owned(),
                )
            })
            .collect();
        assert_eq!(names.len(), 10);
        assert!(names.iter().all(|(x, _)| *x < 800.0), "{names:?}");
        let lines: std::collections::BTreeSet<&String> = names.iter().map(|(_, y)| y).collect();
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn nothing_to_draw_is_an_empty_picture() {
        assert!(Bars::default().draw().unwrap().ends_with("</svg>\n"));
    }
}
