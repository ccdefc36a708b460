//! Checks that every row of docs/failure-table.md and docs/kubernetes-tests.md names a test that exists.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

use std::fs;
use std::path::Path;

fn sources(dir: &Path, all: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_row_of_both_tables_is_shown_by_a_test_of_that_name() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = String::new();
    sources(&root.join("src"), &mut all);
    sources(&root.join("tests"), &mut all);
    for page in ["failure-table", "kubernetes-tests"] {
        let table = fs::read_to_string(root.join(format!("docs/{page}.md"))).unwrap();
        let rows = table.lines().filter(|line| line.starts_with("| ")).skip(1);
        let mut count = 0;
        for row in rows {
            let name = row.trim_end_matches(" |").rsplit("| ").next().unwrap();
            let name = name.trim_matches('`');
            assert!(
                all.contains(&format!("#[test]\nfn {name}("))
                    || all.contains(&format!("#[test]\n    fn {name}(")),
                "no test {name}"
            );
            count += 1;
        }
        assert!(count > 10, "{page} was not read: {count} rows");
    }
}
