//! The sum at the end of `make test` loses no failure: the law of `scripts/test-summary.awk`.

use std::io::Write;
use std::process::{Command, Stdio};

/// What the summary says about `output`, line by line.
fn summary(output: &str) -> Vec<String> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/test-summary.awk");
    let mut awk = Command::new("awk")
        .args(["-f", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("awk runs");
    awk.stdin.take().expect("a pipe").write_all(output.as_bytes()).expect("awk reads");
    let answer = awk.wait_with_output().expect("awk ends");
    assert!(answer.status.success(), "{answer:?}");
    String::from_utf8(answer.stdout).expect("UTF-8").lines().map(str::to_owned).collect()
}

const GOOD: &str = "
     Running unittests src/lib.rs (target/debug/deps/a-1)

running 2 tests
test one ... ok
test two ... ok

test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

const FAILED: &str = "
     Running tests/b.rs (target/debug/deps/b-2)

running 2 tests
test good ... ok
test bad ... FAILED

failures:

---- bad stdout ----
thread 'bad' panicked at tests/b.rs:1:1:
failures:
    not_a_test

failures:
    bad

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

const CRASHED: &str = "
     Running tests/c.rs (target/debug/deps/c-3)

running 1 test
error: test failed, to rerun pass `-p c --test c`

Caused by:
  process didn't exit successfully: `c-3` (signal: 6, SIGABRT: process abort signal)
";

const IGNORED: &str = "
   Doc-tests d

running 1 test
test src/lib.rs - x (line 1) ... ignored

test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

#[test]
fn passes_are_summed_over_programs() {
    assert_eq!(summary(&format!("{GOOD}{GOOD}")), ["sum 4 0"]);
}

#[test]
fn failed_tests_are_counted_and_named_once() {
    let lines = summary(&format!("{GOOD}{FAILED}{GOOD}"));
    assert_eq!(lines, ["failure tests/b.rs (target/debug/deps/b-2): bad", "sum 5 1"]);
}

#[test]
fn crashed_program_is_a_failure_wherever_it_stands() {
    let named = "failure tests/c.rs (target/debug/deps/c-3): ended without a result";
    assert_eq!(summary(&format!("{GOOD}{CRASHED}")), [named, "sum 2 1"]);
    assert_eq!(summary(&format!("{CRASHED}{GOOD}")), [named, "sum 2 1"]);
}

#[test]
fn ignored_test_is_a_failure() {
    let lines = summary(IGNORED);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].contains("no allowed skip"), "{lines:?}");
    assert_eq!(lines[1], "sum 0 1");
}

#[test]
fn what_a_suite_covered_is_shown() {
    let output = format!("\nmodel: 20000 cases, 72000 packets, host and kernel\n{GOOD}");
    let lines = summary(&output);
    assert_eq!(lines, ["note model: 20000 cases, 72000 packets, host and kernel", "sum 2 0"]);
}

#[test]
fn no_output_is_no_pass() {
    assert_eq!(summary(""), ["sum 0 0"]);
}
