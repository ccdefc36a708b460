//! Owns how the C library's heap gives memory back. Never allocates.
//!
//! A store's listing is thousands of small values on several threads. glibc gives every thread a heap of its own, and
//! keeps what was freed in the middle of one, so that what a listing took once would stay with the process. Other C
//! libraries are left as they are: musl gives back by itself.

#![expect(
    unsafe_code,
    reason = "mallopt and malloc_trim have no safe counterpart"
)]

/// Has threads that begin later share one heap. For a program whose fast threads do not allocate.
pub fn share() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt takes its arguments by value, and M_ARENA_MAX stores one aligned word under the main
        // arena's lock (do_set_arena_max in glibc's malloc/malloc.c). Another thread that reads the old value at
        // that moment makes itself one more arena, which is what it would have done before.
        let _accepted = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}

/// Gives free pages back to the kernel. Walks the whole heap: not for after every change.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: malloc_trim takes the heap's own lock and touches only what is free.
        let _some = unsafe { libc::malloc_trim(0) };
    }
}

#[cfg(test)]
mod tests {
    #[cfg(target_env = "gnu")]
    use super::*;

    /// Bytes of this process that are in memory (proc(5), in pages of 4 KiB).
    #[cfg(target_env = "gnu")]
    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages = statm.split(' ').nth(1).unwrap();
        4096 * pages.parse::<usize>().unwrap()
    }

    /// In a process of its own: what other tests take and free meanwhile is not its concern.
    #[cfg(target_env = "gnu")]
    #[test]
    fn memory_between_what_is_held_is_given_back() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture"])
            .arg("sys::heap::tests::gives_back")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}"
        );
    }

    #[cfg(target_env = "gnu")]
    #[test]
    #[ignore = "not a test: the body of the other process"]
    fn gives_back() {
        let mut all: Vec<_> = (0..200_000).map(|n: u32| vec![n; 100]).collect();
        let mut n = 0;
        all.retain(|_| {
            n += 1;
            n % 100 == 0
        });
        let before = resident();
        give_back();
        // 80 MB were freed.
        assert!(resident() + (40 << 20) < before);
        assert!(
            all.iter()
                .all(|one| one[0] % 100 == 99 && one[99] == one[0])
        );
    }
}
