//! Owns how all nodes say that they reach each other. Never examines anybody.

use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _};
use serde::Serialize;

use super::{AT_A_TIME, Examination, PATIENCE, micros};
use crate::probe::directory::Peer;
use crate::wire::probe::Reach;

/// Peers whose own view is asked for.
const MOST_OF_MESH: usize = 256;

/// How one node reaches the others.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    node: String,
    /// Why there is nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    silent: Option<&'static str>,
    cells: Vec<Cell>,
}

#[derive(Debug, Serialize)]
pub(super) struct Cell {
    peer: String,
    reach: &'static str,
    loss_percent: u8,
    rtt_us: Option<u64>,
}

impl Row {
    /// It says something, and nothing bad.
    pub(super) fn is_well(&self) -> bool {
        let bad = [Reach::Loses.name(), Reach::Silent.name()];
        self.silent.is_none() && self.cells.iter().all(|cell| !bad.contains(&cell.reach))
    }
}

impl Examination {
    /// What all nodes say of how they reach each other.
    pub(super) async fn mesh(&self) -> Vec<Row> {
        let peers = self.directory.peers();
        let mut rows = Vec::new();
        for peer in peers.iter().take(MOST_OF_MESH) {
            rows.push(self.row(peer));
        }
        let rows: Vec<Row> = stream::iter(rows).buffered(AT_A_TIME).collect().await;
        let mut all = vec![self.own_row().await];
        all.extend(rows);
        all
    }

    async fn own_row(&self) -> Row {
        let cell = |peer: &Arc<Peer>| {
            let history = peer.history();
            Cell {
                peer: peer.subnets.to_string(),
                reach: history.state().reach.name(),
                loss_percent: history.loss_percent(),
                rtt_us: history.rtt().map(micros),
            }
        };
        Row {
            node: self.own.clone(),
            silent: None,
            cells: self.directory.peers().iter().map(cell).collect(),
        }
    }

    /// A peer's own view, in as many parts as it takes.
    async fn row(&self, peer: &Arc<Peer>) -> Row {
        let mut row = Row {
            node: peer.subnets.to_string(),
            silent: Some("it does not say: it runs another program, or is not reached"),
            cells: Vec::new(),
        };
        let targets = self.directory.targets(peer).into_iter();
        for addr in targets.chain(peer.public.first().copied()) {
            let Ok(mut prober) = self.prober(Some(addr)).await else {
                continue;
            };
            loop {
                let first = u32::try_from(row.cells.len()).unwrap_or(u32::MAX);
                let Some((report, _)) = prober.report(first, PATIENCE).await else {
                    break;
                };
                row.silent = None;
                let more = usize::try_from(report.facts.peers)
                    .unwrap_or(0)
                    .min(MOST_OF_MESH);
                let entries = report.entries.iter().map(|entry| Cell {
                    peer: entry.subnet.to_string(),
                    reach: entry.reach.name(),
                    loss_percent: entry.loss,
                    rtt_us: entry.rtt.map(micros),
                });
                let before = row.cells.len();
                row.cells.extend(entries);
                if row.cells.len() >= more || row.cells.len() == before {
                    return row;
                }
            }
        }
        row
    }
}
