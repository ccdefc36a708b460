//! Owns `loden install-conf`, which puts a file in its place as flannel's helper of that name does (specification
//! section 13.4): whoever reads it meanwhile sees the old one or the new one.

use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;

use crate::file::replace;

/// Arguments of `loden install-conf`.
#[derive(Debug, Args)]
pub(super) struct InstallConfArgs {
    /// The file to copy, and the file to replace by it
    #[arg(value_name = "SRC DEST")]
    files: Vec<PathBuf>,
}

pub(super) fn run(args: &InstallConfArgs) -> anyhow::Result<()> {
    let [source, dest] = args.files.as_slice() else {
        bail!("usage: install-conf SRC DEST");
    };
    let what = || format!("cannot read {}", source.display());
    let file = File::open(source).with_context(what)?;
    let meta = file.metadata().with_context(what)?;
    if !meta.is_file() {
        bail!(
            "{} is not a regular file: name the file to copy",
            source.display()
        );
    }
    Ok(replace(dest, file, meta.permissions().mode() & 0o7777)?)
}
