//! Owns where a capture's packets go: lines, a pipe, a file or a ring of files. Never decides which packets.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Stdout, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::bail;

use super::CaptureArgs;
use crate::cli::page::unwritten;
use crate::datapath::tap::filter::Facts;
use crate::datapath::tap::{Direction, Lost, Record};
use crate::debug::pcapng::{self, Origin, Outcome};

/// Where packets go.
pub(super) struct Sink {
    pub(super) written: u64,
    to: To,
}

enum To {
    Lines(BufWriter<Stdout>),
    Pipe(Box<pcapng::File<BufWriter<Stdout>>>),
    Files(Box<Files>),
}

impl Sink {
    pub(super) fn open(args: &CaptureArgs, origin: Origin) -> anyhow::Result<Self> {
        let to = match &args.write {
            None => To::Lines(BufWriter::new(io::stdout())),
            Some(path) if path == Path::new("-") => {
                if args.file_size.is_some() {
                    bail!("--file-size needs --write with a file's name");
                }
                let stdout = BufWriter::new(io::stdout());
                let file = pcapng::File::begin(stdout, &origin, args.outer).map_err(to_output)?;
                To::Pipe(Box::new(file))
            }
            Some(path) => To::Files(Box::new(Files::create(path, args, origin)?)),
        };
        Ok(Self { written: 0, to })
    }

    pub(super) fn packet(&mut self, record: &Record, bytes: &[u8]) -> io::Result<()> {
        match &mut self.to {
            To::Lines(out) => writeln!(out, "{}", line(record, bytes)).map_err(to_output)?,
            To::Pipe(file) => {
                file.packet(record, bytes).map_err(to_output)?;
            }
            To::Files(files) => files.packet(record, bytes)?,
        }
        self.written += 1;
        Ok(())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        match &mut self.to {
            To::Lines(out) => out.flush().map_err(to_output),
            To::Pipe(file) => file.flush().map_err(to_output),
            To::Files(files) => files.flush(),
        }
    }

    pub(super) fn end(self, lost: Lost) -> io::Result<()> {
        let ended = match self.to {
            To::Lines(mut out) => out.flush().map_err(to_output),
            To::Pipe(file) => file.end(lost).map(drop).map_err(to_output),
            To::Files(files) => files.end(lost),
        };
        match ended {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }
}

fn to_output(error: io::Error) -> io::Error {
    unwritten("standard output", &error)
}

/// One file, or several that follow each other.
struct Files {
    path: PathBuf,
    origin: Origin,
    outer: bool,
    /// Bytes after which the next file begins.
    limit: Option<u64>,
    keep: Option<u32>,
    /// Number of the file being written.
    number: u32,
    len: u64,
    /// None only between two files.
    file: Option<pcapng::File<BufWriter<File>>>,
}

impl Files {
    fn create(path: &Path, args: &CaptureArgs, origin: Origin) -> anyhow::Result<Self> {
        let mut files = Self {
            path: path.to_owned(),
            origin,
            outer: args.outer,
            limit: args.file_size.map(|mib| mib << 20),
            keep: args.files,
            number: 0,
            len: 0,
            file: None,
        };
        files.begin()?;
        Ok(files)
    }

    /// The current file's name: with a number where there may be several, as tcpdump has it.
    fn name(&self) -> PathBuf {
        if self.limit.is_none() {
            return self.path.clone();
        }
        let mut name = self.path.clone().into_os_string();
        name.push(self.number.to_string());
        name.into()
    }

    fn begin(&mut self) -> io::Result<()> {
        let name = self.name();
        let file = File::create(&name).map_err(|error| {
            let text = format!("cannot create {}: {error}", name.display());
            io::Error::new(error.kind(), text)
        })?;
        let writer = BufWriter::new(file);
        let begun = pcapng::File::begin(writer, &self.origin, self.outer);
        self.file = Some(begun.map_err(|error| self.unwritten(&error))?);
        self.len = 0;
        Ok(())
    }

    fn unwritten(&self, error: &io::Error) -> io::Error {
        unwritten(&self.name().to_string_lossy(), error)
    }

    fn packet(&mut self, record: &Record, bytes: &[u8]) -> io::Result<()> {
        if self.limit.is_some_and(|limit| self.len >= limit) {
            if let Some(file) = self.file.take() {
                let ended = file.end(Lost::default());
                ended.map_err(|error| self.unwritten(&error))?;
            }
            self.number += 1;
            if self.keep.is_some_and(|keep| self.number >= keep) {
                self.number = 0;
            }
            self.begin()?;
        }
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let grown = file.packet(record, bytes);
        self.len += grown.map_err(|error| self.unwritten(&error))? as u64;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.file.as_mut().map_or(Ok(()), pcapng::File::flush);
        flushed.map_err(|error| self.unwritten(&error))
    }

    fn end(mut self, lost: Lost) -> io::Result<()> {
        let ended = match self.file.take() {
            Some(file) => file.end(lost).map(drop),
            None => Ok(()),
        };
        ended.map_err(|error| self.unwritten(&error))
    }
}

/// One packet as a line of text.
pub(super) fn line(record: &Record, bytes: &[u8]) -> String {
    let (seconds, nanos) = (
        record.time_ns / 1_000_000_000,
        record.time_ns % 1_000_000_000,
    );
    let direction = match record.direction {
        Direction::Encap => "encap",
        Direction::Decap => "decap",
    };
    let mut line = format!(
        "{:02}:{:02}:{:02}.{:06} {direction} ",
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
        nanos / 1000
    );
    let facts = Facts::of(record, bytes);
    let protocol = match facts.protocol() {
        Some(1) => "icmp".to_owned(),
        Some(6) => "tcp".to_owned(),
        Some(17) => "udp".to_owned(),
        Some(58) => "icmp6".to_owned(),
        Some(other) => format!("proto {other}"),
        None => "no IP packet".to_owned(),
    };
    if let Some((src, dst)) = facts.addrs() {
        let (src, dst) = match facts.ports() {
            Some((from, to)) => (
                SocketAddr::new(src, from).to_string(),
                SocketAddr::new(dst, to).to_string(),
            ),
            None => (src.to_string(), dst.to_string()),
        };
        // Writing to a string cannot fail.
        let _infallible = write!(line, "{src} > {dst} ");
    }
    let _infallible = write!(line, "{protocol} {} bytes: {}", record.len, Outcome(record));
    line
}
