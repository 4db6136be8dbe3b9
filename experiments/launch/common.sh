# Functions that the recipes of this folder share. A recipe collects commands, prints all of them,
# and then runs them; each is text that can be pasted into a shell.
# shellcheck shell=bash
set -euo pipefail

recipe=${0##*/}
# shellcheck disable=SC2034  # the recipes read it
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
titles=()
commands=()
hints=()

fail() { # in one line, as a user's mistake
  echo "$recipe: $*" >&2
  exit 2
}

# Reads [--dry-run] CONFIG [settings…] into dry_run and settings.
arguments() {
  dry_run=no
  if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
  fi
  if [[ $# == 0 || $1 == -* ]]; then
    fail "the config is missing: bash $recipe [--dry-run] paper:prmoe_1.3b [settings…]"
  fi
  settings="$(quote "--config=$1" "${@:2}")"
}

# The variable NAME must be set; else its MEANING is told.
required() {
  [[ -n ${!1:-} ]] || fail "$1 is not set; give $1=$2"
}

# Words as one line for a shell, with quotes only where they are needed.
quote() {
  local word line=
  for word in "$@"; do
    if [[ -z $word || $word == *[!A-Za-z0-9_./:=,@%+-]* ]]; then
      word=\'${word//\'/\'\\\'\'}\'
    fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Splits TOPOLOGY, such as 2xv5p:4x4x8, into slices, chip and shape.
# shellcheck disable=SC2034  # the recipes read them
topology() {
  required TOPOLOGY '[SLICESx]CHIP:SHAPE, as for prmoe plan'
  [[ $TOPOLOGY =~ ^(([1-9][0-9]*)x)?([a-z][a-z0-9]*):([1-9][0-9]*(x[1-9][0-9]*)*)$ ]] ||
    fail "TOPOLOGY=$TOPOLOGY is no topology; give one such as v5p:4x4x8, 2xv5p:4x4x8 or h100:16x8"
  slices=${BASH_REMATCH[2]:-1} chip=${BASH_REMATCH[3]} shape=${BASH_REMATCH[4]}
}

# A pod's hosts share no disk.
store() {
  required WORKDIR 'gs://BUCKET/FOLDER'
  [[ $WORKDIR == gs://?* ]] ||
    fail "WORKDIR=$WORKDIR is no folder in a store, and a pod's hosts share no disk; give gs://BUCKET/FOLDER"
}

step() { # TITLE COMMAND
  titles+=("$1")
  commands+=("$2")
}

later() { # TITLE COMMAND, for the reader
  hints+=("# $1" "$2")
}

# A step, unless PLAN=no: the train step's time and memory, and what the run costs. TEACHER is the
# config of the model that teaches in it, such as paper:prmoe_350m.
plan() {
  [[ ${PLAN:-yes} == no ]] && return
  [[ ${PRICE:-} =~ ^([0-9]+([.][0-9]+)?)?$ ]] ||
    fail "PRICE=$PRICE must be a number, the price of a chip for an hour"
  step 'what it costs, and whether it fits (PLAN=no leaves this out)' \
    "$(quote "${prmoe:-prmoe}") plan --topology=$TOPOLOGY ${TEACHER:+$(quote "--teacher=$TEACHER") }$settings |
  awk -v price=${PRICE:-0} -f $(quote "$repository/experiments/launch/cost.awk")"
}

# Prints all commands; then runs them, unless this is a dry run. The last one takes the place of the
# recipe, so that it gets the recipe's signals.
go() {
  local i last=$((${#commands[@]} - 1))
  for i in "${!commands[@]}"; do
    printf '# %d. %s\n%s\n\n' $((i + 1)) "${titles[i]}" "${commands[i]}"
  done
  printf '# Later:\n'
  printf '%s\n' "${hints[@]}"
  [[ $dry_run == no ]] || exit 0
  for i in "${!commands[@]}"; do
    printf '\n==> %d. %s\n' $((i + 1)) "${titles[i]}"
    [[ $i != "$last" ]] || exec bash -euo pipefail -c "${commands[i]}"
    bash -euo pipefail -c "${commands[i]}"
  done
}
