# Reads what `cargo test` printed (without colours); prints a line "failure <program>: <test>" for each
# failed test, "note <line>" for a line that a suite wants shown (what it covered: "model: ..."), and at
# the end "sum <passed> <failed>".
#
# A program without a result line crashed, which counts as one failure. An ignored test is a skip that
# nobody allowed, so a failure as well.


function close_program() {
  if (program != "" && !result) { crashed++; print "failure " program ": ended without a result" }
}
/^ +(Running|Doc-tests) / {
  close_program(); program = $0; sub(/^ +/, "", program); sub(/^Running /, "", program)
  result = 0; next
}
/^model: [0-9]+ / { print "note " $0; next }
/^failures:$/ { listing = 1; n = 0; next }
listing && /^    [^ ]/ { name = $0; sub(/^ +/, "", name); names[n++] = name; next }
/^test .* \.\.\. ignored/ { print "failure " program ": " $2 " is ignored, which is no allowed skip"; next }
/^test result: / {
  for (i = 1; i < NF; i++) {
    if ($(i + 1) ~ /^passed/) passed += $i
    if ($(i + 1) ~ /^failed/) failed += $i
    if ($(i + 1) ~ /^ignored/) ignored += $i
  }
  if ($0 ~ /FAILED/) for (i = 0; i < n; i++) print "failure " program ": " names[i]
  result = 1; listing = 0; n = 0
}
END { close_program(); print "sum", passed + 0, failed + crashed + ignored + 0 }
