//! A report as one HTML file with its conditions, its figures and plots: nothing is fetched.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use plotters::prelude::*;
use serde_json::Value;

use super::BenchError;
use super::compare::{Report, Row};

const WIDTH: u32 = 1000;
/// Pixels of a plot beside its rows.
const MARGINS: u32 = 90;
const ROW_HEIGHT: u32 = 26;
const LABEL_WIDTH: u32 = 190;

const STYLE: &str = "body{font-family:sans-serif;max-width:1040px;margin:2em auto;color:#222}\
table{border-collapse:collapse;margin:1em 0}th,td{padding:2px 10px;text-align:left;border-bottom:1px solid #ddd}\
td.n{text-align:right;font-variant-numeric:tabular-nums}td.e{color:#b00}h2{margin-top:1.6em}";

/// `sluice bench html`.
#[derive(Debug, Args)]
pub struct HtmlArgs {
    /// The report: the output of `sluice bench progrun --output json`.
    #[arg(value_name = "A.json")]
    report: PathBuf,
    /// Where to write the page [default: standard output].
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
}

pub(super) fn run(args: &HtmlArgs) -> Result<(String, ExitCode), BenchError> {
    let page = page(&Report::read(&args.report)?)?;
    let Some(path) = &args.to else { return Ok((page, ExitCode::SUCCESS)) };
    std::fs::write(path, page)
        .map_err(|source| BenchError::Write { path: path.clone(), source })?;
    Ok((format!("{}\n", path.display()), ExitCode::SUCCESS))
}

/// The page.
///
/// # Errors
/// When a plot cannot be drawn.
pub(super) fn page(report: &Report) -> Result<String, BenchError> {
    let floors = report.rows.iter().find(|row| row.name == "floor").map(|row| &row.samples[..]);
    let ratios: Vec<(String, Vec<f64>)> = report
        .rows
        .iter()
        .filter(|row| row.family.is_some())
        .filter_map(|row| Some((row.title(), ratios(row, floors?)?)))
        .collect();
    let (new, known): (Vec<_>, Vec<_>) =
        ratios.into_iter().partition(|(title, _)| title.ends_with("new flows"));
    let plots = [
        ("Known connections, and what needs none", plot(&known)?),
        ("Every packet a new connection", plot(&new)?),
    ];
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head { meta charset="utf-8"; title { "sluice bench progrun" } style { (STYLE) } }
            body {
                h1 { "What a packet costs" }
                p {
                    "Ratios to F, the same measurement with an empty program, of the same round. "
                    "Ratios within one run can be compared between machines, nanoseconds cannot. "
                    "Rows with 65536 flows measure the processor's caches."
                }
                @for (title, plot) in &plots {
                    @if let Some(svg) = plot { h2 { (title) } (PreEscaped(svg)) }
                }
                h2 { "Figures" }
                (figures(report))
                h2 { "Conditions" }
                (conditions(&report.conditions))
            }
        }
    };
    Ok(page.into_string())
}

/// A row's samples against F of the same rounds.
fn ratios(row: &Row, floors: &[f64]) -> Option<Vec<f64>> {
    let whole = !row.samples.is_empty() && row.samples.len() == floors.len();
    whole.then(|| row.samples.iter().zip(floors).map(|(sample, floor)| sample / floor).collect())
}

fn figures(report: &Report) -> Markup {
    html! {
        table {
            tr { @for name in ["path", "IP", "flows", "x F", "quartiles", "ns", "net ns", ""] { th { (name) } } }
            @for row in &report.rows {
                tr {
                    td { (row.name) }
                    td { (row.family.as_deref().unwrap_or_default()) }
                    td.n { (row.flows.map_or("new".to_owned(), |n| n.to_string())) }
                    @if let Some(f) = &row.figures {
                        td.n { (format!("{:.2}", f.ratio)) }
                        td.n { (format!("{:.2} to {:.2}", f.ratio_low, f.ratio_high)) }
                        td.n { (row.median.map_or(String::new(), |ns| format!("{ns:.1}"))) }
                        td.n { (format!("{:.1}", f.net)) }
                    } @else {
                        td.e colspan="4" { (row.error.as_deref().unwrap_or("not measured")) }
                    }
                    td { (row.text.as_deref().unwrap_or_default()) }
                }
            }
        }
    }
}

fn conditions(value: &Value) -> Markup {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    html! {
        table {
            @for (name, value) in value.as_object().into_iter().flatten() {
                tr {
                    td { (name.replace('_', " ")) }
                    td {
                        @match value {
                            Value::Object(inner) => {
                                @for (name, value) in inner { (name) ": " (text(value)) br; }
                            }
                            value => (text(value)),
                        }
                    }
                }
            }
        }
    }
}

/// A box for each row: quartiles, and the farthest rounds within one and a half of their distance.
/// None without rows.
fn plot(rows: &[(String, Vec<f64>)]) -> Result<Option<String>, BenchError> {
    if rows.is_empty() {
        return Ok(None);
    }
    let mut svg = String::new();
    draw(&mut svg, rows).map_err(|e| BenchError::Plot(e.to_string()))?;
    Ok(Some(svg))
}

fn draw(svg: &mut String, rows: &[(String, Vec<f64>)]) -> Result<(), Box<dyn std::error::Error>> {
    let boxes: Vec<Quartiles> = rows.iter().map(|(_, ratios)| Quartiles::new(ratios)).collect();
    let highest = boxes.iter().map(|quartiles| quartiles.values()[4]).fold(1.0, f32::max);
    let mut titles: Vec<&str> = rows.iter().map(|(title, _)| title.as_str()).collect();
    if titles.len() == 1 {
        // An axis with one name has no length, and shows none.
        titles.push("");
    }
    let area = SVGBackend::with_string(svg, (WIDTH, MARGINS + ROW_HEIGHT * titles.len() as u32))
        .into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(LABEL_WIDTH)
        .build_cartesian_2d(0.0..highest * 1.05, titles[..].into_segmented())?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc("times F")
        .y_labels(titles.len() + 1)
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 13))
        .y_label_formatter(&|segment| match segment {
            SegmentValue::CenterOf(title) => (**title).to_owned(),
            SegmentValue::Exact(_) | SegmentValue::Last => String::new(),
        })
        .light_line_style(WHITE)
        .draw()?;
    chart.draw_series(titles.iter().zip(&boxes).map(|(title, quartiles)| {
        Boxplot::new_horizontal(SegmentValue::CenterOf(title), quartiles)
            .width(ROW_HEIGHT / 2)
            .whisker_width(0.6)
            .style(BLUE)
    }))?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report() -> Report {
        let row = |name: &str, flows: Option<u32>, samples: [f64; 3]| {
            json!({
                "name": name, "family": "v6", "flows": flows, "samples": samples, "median": samples[1],
                "ratio": samples[1] / 10.0, "ratio_low": 1.0, "ratio_high": 9.0, "net": samples[1] - 10.0,
                "text": "<told> & plain",
            })
        };
        let report = json!({
            "bench": "progrun",
            "conditions": {"kernel": "6.18 <test>", "maps": {"sl_flow_v1": 8192}},
            "rows": [
                {"name": "floor", "family": null, "flows": 1, "samples": [10.0, 10.0, 10.0]},
                row("decap", Some(4096), [20.0, 21.0, 30.0]),
                row("dnat-new", None, [200.0, 210.0, 230.0]),
                {"name": "drop", "family": "v4", "flows": 1, "samples": [], "error": "went astray"},
            ],
        });
        Report::parse(&report.to_string()).expect("a report")
    }

    #[test]
    fn page_has_plots_figures_and_conditions_and_fetches_nothing() {
        let page = page(&report()).expect("drawn");
        for words in ["decap v6 4096 flows", "dnat-new v6 new flows", "went astray", "8192", "2.10"]
        {
            assert!(page.contains(words), "{words}: {page}");
        }
        assert_eq!(page.matches("<svg").count(), 2);
        for fetched in ["<script", "<link", "src=", "href="] {
            assert!(!page.contains(fetched), "{fetched}");
        }
    }

    #[test]
    fn what_stands_in_a_report_is_text() {
        let page = page(&report()).expect("drawn");
        assert!(page.contains("6.18 &lt;test&gt;") && page.contains("&lt;told&gt; &amp; plain"));
    }
}
