//! Owns the `extension` backend's part of the `Backend` object: its commands. Never runs one.

use super::backend::TYPE;
use super::{ConfigError, Object};

/// A program and its arguments, to be run without a shell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Argv(Vec<String>);

/// Words of one command.
const MAX_WORDS: usize = 64;

impl Argv {
    /// At least a program's name. `None` for none, and for more words than anybody needs.
    #[must_use]
    pub fn new(words: Vec<String>) -> Option<Self> {
        let program = words.first().is_some_and(|word| !word.is_empty());
        (program && words.len() <= MAX_WORDS).then_some(Self(words))
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> &str {
        self.0.first().map_or("", String::as_str)
    }

    /// Its arguments.
    #[must_use]
    pub fn arguments(&self) -> &[String] {
        self.0.get(1..).unwrap_or_default()
    }
}

/// Commands of the `extension` backend; specification section 8.9.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExtensionBackend {
    /// Before the lease; what it prints is published.
    pub pre_startup: Option<Argv>,
    /// After the lease.
    pub post_startup: Option<Argv>,
    /// For every peer that comes.
    pub subnet_add: Option<Argv>,
    /// For every peer that goes.
    pub subnet_remove: Option<Argv>,
}

const PRE: &str = "PreStartupCommand";
const POST: &str = "PostStartupCommand";
const ADD: &str = "SubnetAddCommand";
const REMOVE: &str = "SubnetRemoveCommand";

/// The keys of the backend.
pub(super) const KEYS: &[&str] = &[TYPE, PRE, POST, ADD, REMOVE];

impl ExtensionBackend {
    pub(super) fn read(object: &Object) -> Result<Self, ConfigError> {
        Ok(Self {
            pre_startup: command(object, PRE)?,
            post_startup: command(object, POST)?,
            subnet_add: command(object, ADD)?,
            subnet_remove: command(object, REMOVE)?,
        })
    }
}

/// Words in one text, parted by white space as flannel does it, or one by one in a list. flannel puts variables in the
/// place of `$NAME`; what comes from the store is no part of a command here, and a `$` would be taken for nothing else.
fn command(object: &Object, key: &'static str) -> Result<Option<Argv>, ConfigError> {
    const EXPECTED: &str = "a program and its arguments, in one text or in a list, without variables: those are in its \
                            environment, where a script can read them";
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Words {
        Text(String),
        List(Vec<String>),
    }
    let words = match object.plain::<Words>(key, EXPECTED)? {
        None => return Ok(None),
        Some(Words::Text(text)) => text.split_whitespace().map(str::to_owned).collect(),
        Some(Words::List(list)) => list,
    };
    if words.is_empty() {
        return Ok(None);
    }
    let shown = words.join(" ");
    if words.iter().any(|word| word.contains(['$', '\0'])) {
        return Err(object.refuse(key, EXPECTED, &shown).into());
    }
    match Argv::new(words) {
        Some(argv) => Ok(Some(argv)),
        None => Err(object.refuse(key, EXPECTED, &shown).into()),
    }
}
