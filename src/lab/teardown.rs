//! Owns removing labs: one's own at the end, and what an earlier program left, found by name. Never removes
//! a namespace whose name no lab would give, nor ends a process that its pid file does not fit.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::netns::NETNS_DIR;
use super::process::Identity;
use super::state::{self, Claim, RUN_DIR};
use super::{Error, LabName, Member, command, wireguard};

/// What belonged to a lab and is gone now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Namespaces.
    pub namespaces: Vec<String>,
    /// Processes that still ran.
    pub processes: Vec<i32>,
}

/// Removes the lab called `name`, or what is left of it.
///
/// # Errors
/// [`Error::NotFound`] if nothing carries that name, [`Error::InUse`] if a running program holds it,
/// [`Error::Teardown`] if something could not be removed.
pub fn down(name: &LabName) -> Result<Removed, Error> {
    if !names()?.contains(name) {
        return Err(Error::NotFound {
            thing: format!("lab {name}"),
        });
    }
    let _claim = Claim::take(name)?;
    remove(name)
}

/// The names of all labs of which anything is there: a namespace or a directory.
///
/// # Errors
/// [`Error::Io`] if a directory cannot be read.
pub fn names() -> Result<BTreeSet<LabName>, Error> {
    let namespaces = entries(Path::new(NETNS_DIR))?;
    let from_namespaces = namespaces
        .iter()
        .filter_map(|ns| LabName::of_namespace(ns))
        .map(|(name, _)| name);
    let directories = entries(Path::new(RUN_DIR))?;
    Ok(directories
        .iter()
        .filter_map(|dir| dir.parse().ok())
        .chain(from_namespaces)
        .collect())
}

/// The namespaces that carry the lab's name.
///
/// # Errors
/// [`Error::Io`] if the directory of namespaces cannot be read.
pub fn namespaces_of(name: &LabName) -> Result<Vec<String>, Error> {
    let mut all = entries(Path::new(NETNS_DIR))?;
    all.retain(|ns| LabName::of_namespace(ns).is_some_and(|(owner, _)| owner == *name));
    Ok(all)
}

/// The processes recorded for the lab that still run.
///
/// # Errors
/// [`Error::Io`] if the lab's directory cannot be read.
pub fn processes_of(name: &LabName) -> Result<Vec<Identity>, Error> {
    let mut found = Vec::new();
    let top = state::directory(name);
    let below = entries(&top)?
        .into_iter()
        .map(|entry| top.join(entry))
        .filter(|path| path.is_dir());
    for dir in below.chain([top.clone()]) {
        for entry in entries(&dir)? {
            let path = dir.join(&entry);
            if path.extension().is_none_or(|extension| extension != "pid") {
                continue;
            }
            // A pid file cut short by a crash names no process that could be told from a foreign one.
            if let Ok(identity) = state::read_json::<Identity>(&path)
                && identity.is_alive()
            {
                found.push(identity);
            }
        }
    }
    Ok(found)
}

/// Removes what is there under `name` except the claim on it: the start of every build.
pub(crate) fn sweep(name: &LabName) -> Result<(), Error> {
    let mut problems = Vec::new();
    stop_processes(name, &mut problems);
    delete_namespaces(name, &mut problems);
    let dir = state::directory(name);
    for entry in entries(&dir)?.into_iter().filter(|entry| entry != "lock") {
        let path = dir.join(entry);
        let gone = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        problems.extend(
            gone.map_err(Error::io("remove", path.display().to_string()))
                .err(),
        );
    }
    verdict(name, problems)
}

/// Removes everything under `name`; the caller holds the claim, whose file goes with the rest.
pub(crate) fn remove(name: &LabName) -> Result<Removed, Error> {
    let mut problems = Vec::new();
    let removed = Removed {
        processes: stop_processes(name, &mut problems),
        namespaces: delete_namespaces(name, &mut problems),
    };
    let dir = state::directory(name);
    if let Err(source) = fs::remove_dir_all(&dir)
        && source.kind() != io::ErrorKind::NotFound
    {
        problems.push(Error::io("remove", dir.display().to_string())(source));
    }
    // The parent goes with its last lab. Any refusal means that another lab still needs it.
    if let Err(error) = fs::remove_dir(RUN_DIR) {
        tracing::trace!(%error, "{RUN_DIR} stays");
    }
    verdict(name, problems).map(|()| removed)
}

pub(crate) fn verdict(name: &LabName, problems: Vec<Error>) -> Result<(), Error> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Teardown {
        name: name.to_string(),
        problems,
    })
}

fn stop_processes(name: &LabName, problems: &mut Vec<Error>) -> Vec<i32> {
    let found = processes_of(name).unwrap_or_else(|error| {
        problems.push(error);
        Vec::new()
    });
    problems.extend(found.iter().filter_map(|identity| identity.stop().err()));
    found.iter().map(|identity| identity.pid).collect()
}

fn delete_namespaces(name: &LabName, problems: &mut Vec<Error>) -> Vec<String> {
    let found = namespaces_of(name).unwrap_or_else(|error| {
        problems.push(error);
        Vec::new()
    });
    for namespace in &found {
        if let Some((name, Member::Node(node))) = LabName::of_namespace(namespace) {
            problems.extend(wireguard::remove_socket(&name, node).err());
        }
    }
    // One command each: a batch would stop at the first that another teardown has removed meanwhile.
    for namespace in &found {
        let deleted = command::run(None, "ip", &["netns", "del", namespace]);
        if let Err(error) = deleted
            && Path::new(NETNS_DIR).join(namespace).exists()
        {
            problems.push(error);
        }
    }
    found
}

/// The names in a directory, sorted; none if there is no such directory.
fn entries(dir: &Path) -> Result<Vec<String>, Error> {
    let shown = || PathBuf::from(dir).display().to_string();
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", shown())(error)),
    };
    let mut names = Vec::new();
    for entry in listing {
        let entry = entry.map_err(Error::io("list", shown()))?;
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}
