//! docs/debugging.md explains what the program refers to, and shows what the program prints.

use std::fs;
use std::path::Path;
use std::process::Command;

use loden::datapath::DropReason;

fn document() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/debugging.md");
    fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn every_drop_reason_has_the_heading_that_it_names_and_no_heading_is_left_over() {
    let text = document();
    let (_, section) = text.split_once("## Drop reasons\n").unwrap_or_default();
    let headings: Vec<&str> = section
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();
    let reasons: Vec<&str> = DropReason::ALL.iter().map(|r| r.name()).collect();
    assert_eq!(headings, reasons);
    for reason in DropReason::ALL {
        assert_eq!(
            reason.document(),
            format!("docs/debugging.md#{}", reason.name())
        );
    }
}

#[test]
fn every_link_within_the_document_leads_somewhere() {
    let text = document();
    let links: Vec<&str> = text
        .split("](#")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .collect();
    assert!(!links.is_empty());
    for link in links {
        assert!(text.contains(&format!("\n### {link}\n")), "{link}");
    }
}

/// The flags of every `loden` command line in the document are flags that the command has.
#[test]
fn every_command_line_is_one_that_the_program_takes() {
    let text = document();
    let mut seen = 0;
    for line in text
        .lines()
        .filter_map(|line| line.strip_prefix("$ loden "))
    {
        let words: Vec<&str> = line.split_whitespace().collect();
        // Reaches the daemon's socket, which is not there, and no further.
        let output = Command::new(env!("CARGO_BIN_EXE_loden"))
            .args(&words)
            .args(["--socket", "/nonexistent/subnet.sock"])
            .output();
        let errors = output.map(|output| String::from_utf8_lossy(&output.stderr).into_owned());
        let errors = errors.unwrap_or_default();
        assert!(errors.contains("no daemon answers"), "{line}: {errors}");
        seen += 1;
    }
    assert!(seen > 5, "{seen}");
}

/// What the document shows of a daemon's answers is made of the program's own words.
#[test]
fn remedies_in_the_examples_are_those_of_the_program() {
    let text = document();
    let shown = text.lines().filter_map(|line| {
        let (_, rest) = line
            .split_once(": dropped: ")
            .or_else(|| line.split_once(": answered: "))?;
        let name = rest.split([',', ';']).next()?;
        Some((name, rest.split_once("; ")?.1))
    });
    let mut seen = 0;
    for (name, remedy) in shown {
        let reason = DropReason::ALL.iter().find(|reason| reason.name() == name);
        assert_eq!(reason.map(|reason| reason.remedy()), Some(remedy), "{name}");
        seen += 1;
    }
    assert!(seen >= 3, "{seen}");
}
