#!/usr/bin/env bash
# Runs a command, and passes SIGTERM on to it. A run that saved a checkpoint after SIGTERM ends with
# exit code 0, which a launcher takes for the end of training; here that becomes 42, "start again".
set -uo pipefail
signals=0
trap 'signals=$((signals + 1)); kill -TERM "$!"' TERM
"$@" &
child=$!
while
  before=$signals
  wait "$child"
  code=$?
  [[ $signals != "$before" ]] # a signal ended this wait; the command goes on
do :; done
if [[ $signals != 0 && $code == 0 ]]; then
  code=42
fi
exit "$code"
