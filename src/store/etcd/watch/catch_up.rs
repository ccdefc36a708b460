//! Owns how a watch gets to where the store is: checks that it is still the one we know, lists it, and starts to watch
//! from there on. Never hands anything on.

use std::time::Duration;

use etcd_client::{
    GetOptions, GetResponse, ResponseHeader, SortOrder, SortTarget, WatchOptions, WatchStream,
};
use tokio::time::Instant;

use super::{End, Watcher, cancelled, item};
use crate::store::etcd::cluster::Connection;
use crate::store::etcd::failure::{Failure, FailureCause};
use crate::store::etcd::view::Position;

/// How long a server may take to start a watch.
const START: Duration = Duration::from_secs(3);

impl Watcher {
    /// Whether the store still is what it was at our position: has that in its history, with the same keys.
    pub(super) async fn is_the_same_store(&self, connection: &Connection) -> Result<bool, Failure> {
        let (Some(at), Some(known)) = (self.view.position(), self.view.fingerprint()) else {
            return Ok(false);
        };
        let options = GetOptions::new()
            .with_prefix()
            .with_revision(at.revision)
            .with_sort(SortTarget::Mod, SortOrder::Descend)
            .with_limit(1)
            .with_keys_only();
        let mut kv = connection.kv();
        let answer = connection
            .call(kv.get(self.inner.keys.subnets(), Some(options)))
            .await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(Failure {
                cause: FailureCause::Compacted | FailureCause::FutureRevision,
                ..
            }) => return Ok(false),
            Err(failure) => return Err(failure),
        };
        let newest = answer.kvs().first();
        Ok(cluster_id(answer.header()) == at.cluster
            && usize::try_from(answer.count()) == Ok(known.count)
            && newest.is_some_and(|kv| {
                kv.key() == known.newest && kv.mod_revision() == known.mod_revision
            }))
    }

    /// Lists all leases, and the extensions if we may read them; returns whether we may.
    pub(super) async fn list(&mut self, connection: &Connection) -> Result<bool, Failure> {
        let keys = &self.inner.keys;
        let range = GetOptions::new().with_range(keys.subnets_end());
        let mut kv = connection.kv();
        let (listing, wide) = match connection
            .call(kv.get(keys.extensions(), Some(range.clone())))
            .await
        {
            Ok(listing) => (listing, true),
            Err(Failure {
                cause: FailureCause::PermissionDenied(_),
                ..
            }) => {
                let narrow = connection.call(kv.get(keys.subnets(), Some(range))).await?;
                self.inner.forbid_extensions();
                (narrow, false)
            }
            Err(failure) => return Err(failure),
        };
        let at = position(&listing);
        let now = self.now();
        let found = self.view.replace(listing.kvs().iter().map(item), at, now);
        self.news.replaced();
        self.news.found(found);
        self.progress.restart();
        self.progress.news(at.revision, Instant::now().into_std());
        self.suspect = true;
        Ok(wide)
    }

    /// Starts to watch behind what is known.
    pub(super) async fn open(
        &self,
        connection: &Connection,
        wide: bool,
    ) -> Result<WatchStream, End> {
        let keys = &self.inner.keys;
        let next = self.view.position().map_or(0, |at| at.revision) + 1;
        let options = WatchOptions::new()
            .with_range(keys.subnets_end())
            .with_start_revision(next);
        let first = if wide {
            keys.extensions()
        } else {
            keys.subnets()
        };
        let mut watches = connection.watches();
        let mut stream = connection.call(watches.watch(first, Some(options))).await?;
        let started = tokio::time::timeout(START, stream.message()).await;
        let answer = match started {
            Ok(answer) => connection.call(std::future::ready(answer)).await?,
            Err(_elapsed) => {
                connection.give_up();
                return Err(connection.failure(FailureCause::TimedOut(START)).into());
            }
        };
        match answer {
            Some(response) if response.canceled() => Err(cancelled(connection, &response)),
            Some(_created) => Ok(stream),
            None => {
                connection.give_up();
                Err(connection.refusal("").into())
            }
        }
    }
}

fn position(listing: &GetResponse) -> Position {
    Position {
        cluster: cluster_id(listing.header()),
        revision: listing.header().map_or(0, ResponseHeader::revision),
    }
}

fn cluster_id(header: Option<&ResponseHeader>) -> u64 {
    header.map_or(0, ResponseHeader::cluster_id)
}
