#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| loden_fuzz::probe::run(data));
