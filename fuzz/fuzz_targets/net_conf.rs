//! Runs `loden_fuzz::net_conf` under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| loden_fuzz::net_conf::net_conf(data));
