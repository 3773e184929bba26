# Sourced by the sweeps (table2.sh, transfer.sh, ...): the vocabulary they are written in.
#
#   bash scripts/table2.sh                      runs the commands one after another; again, it goes on where it was
#   bash scripts/table2.sh --dry-run            prints them, a command a line, for scripts/sweep.py, xargs or a Slurm array
#   bash scripts/table2.sh --dry-run --stage 1  only those that need no other's ticket; then 2, those that do
#
# Variables to set before the command (MODEL=all-MiniLM-L6-v2 SEEDS="1 2" bash scripts/table2.sh):
#   SEEDS   the seeds                       MODEL       a BERT checkpoint
#   TASKS   the tasks, where there are any  FLAGS       flags for every training
#   STEP    percent that a level removes    GLUE_FLAGS  SQUAD_FLAGS  MLM_FLAGS   flags for those scripts only
#   LEVELS  levels of a run, 0 % counted    OUTPUT      where runs, masks and weights go
#   PYTHON  the interpreter
# FLAGS and its like are split as the shell splits words: FLAGS="--data-dir 'my data'" holds two.

: "${MODEL:=bert-base-uncased}" "${STEP:=10}" "${OUTPUT:=runs}" "${PYTHON:=python}"
: "${FLAGS:=}" "${GLUE_FLAGS:=}" "${SQUAD_FLAGS:=}" "${MLM_FLAGS:=}" "${LEVELS:=}"
GLUE_TASKS="mnli qqp stsb wnli qnli mrpc rte sst2 cola"
ALL_TASKS="$GLUE_TASKS squad mlm"

arguments=("$@")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=false stage_wanted='' failures=()

fail() { echo "error: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --stage) [[ ${2-} =~ ^[123]$ ]] || fail "--stage 1, 2 or 3 is needed"; stage_wanted=$2; shift ;;
    -h | --help) for file in "$0" "${BASH_SOURCE[0]}"; do sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$file"; echo; done; exit 0 ;;
    *) fail "$1 is no flag of this sweep; it has --dry-run, --stage N and --help" ;;
  esac
  shift
done
need_percent() { # variable, value
  [[ $2 =~ ^[1-9][0-9]?$ ]] || fail "$1=$2: whole percents from 1 to 99 are needed"
}
need_percent STEP "$STEP"
for percent in ${SPARSITY-}; do need_percent SPARSITY "$percent"; done
for percent in ${SPARSITIES-}; do need_percent SPARSITIES "$percent"; done
[[ $LEVELS =~ ^([1-9][0-9]*)?$ ]] || fail "LEVELS=$LEVELS: a whole number is needed"
case " $FLAGS $GLUE_FLAGS $SQUAD_FLAGS $MLM_FLAGS " in
  *" --rate"* | *" --levels"*) fail "--rate and --levels of a sweep are its variables STEP (percent) and LEVELS" ;;
  *" --schedule"*) fail "a sweep's levels are of --schedule linear: STEP percent of the original weights each" ;;
esac
if ! $dry_run; then # a mistake in the variables is met now, and not after days of training
  bash "$0" ${arguments[@]+"${arguments[@]}"} --dry-run > /dev/null 2>&1 || exec bash "$0" --dry-run > /dev/null
fi

# One command of the sweep: run, or printed. A failed one is named at the end and does not stop the others; a stopped one does.
# Stage 1 needs nothing of the others, stage 2 what stage 1 made, stage 3 what stage 2 made.
declare -A met=()
emit() { # stage, command ...
  local stage=$1 code=0 line
  shift
  printf -v line '%q ' "$@"
  [ -z "${met[$line]-}" ] || return 0
  met[$line]=1
  [ -z "$stage_wanted" ] || [ "$stage_wanted" = "$stage" ] || return 0
  if $dry_run; then
    echo "${line% }"
    return
  fi
  printf '\n$ %s\n' "${line% }"
  attend "$@" || code=$?
  if [ $code -eq 130 ] || [ $code -eq 143 ]; then # Ctrl-C, SIGTERM; what the kernel killed for its memory is a failed one
    echo "stopped; the same command goes on" >&2
    exit $code
  elif [ $code -ne 0 ]; then
    failures+=("exit code $code: ${line% }")
  fi
}

# Run a command and pass on what asks this sweep to stop: bash by itself would end and leave it running. It is a group of its own,
# so that Ctrl-C reaches it once, and its exit code is the code here.
attend() { # command ...
  local child code signal
  set -m
  "$@" &
  child=$!
  set +m
  for signal in INT TERM HUP; do trap "kill -$signal -- -$child 2> /dev/null" "$signal"; done
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2> /dev/null; do :; done # a signal ends the waiting, not the child
  trap - INT TERM HUP
  return $code
}

# What is made of the runs when all have ended; a dry run only names it.
finally() { # command ...
  if $dry_run; then
    printf '# when all have ended: ' >&2
    printf '%q ' "$@" >&2
    echo >&2
  elif [ -z "$stage_wanted" ]; then
    emit last "$@"
  fi
  if [ ${#failures[@]} -gt 0 ]; then
    printf '\n%d command(s) failed:\n' ${#failures[@]} >&2
    printf '  %s\n' "${failures[@]}" >&2
    exit 1
  fi
}

share() { # percent
  local digits
  printf -v digits '%02d' "$1"
  echo "0.${digits%0}"
}

# The training command of a task, in the array `command`.
training() { # task, seed, flags ...
  local task=$1 seed=$2
  shift 2
  case $task in
    mlm) command=("$PYTHON" lt_pretrain.py) extra=$MLM_FLAGS ;;
    squad) command=("$PYTHON" lt_squad.py) extra=$SQUAD_FLAGS ;;
    *) command=("$PYTHON" lt_glue.py --task "$task") extra=$GLUE_FLAGS ;;
  esac
  [ "$MODEL" = bert-base-uncased ] || command+=(--model "$MODEL")
  [ "$OUTPUT" = runs ] || command+=(--output-dir "$OUTPUT")
  eval "command+=(--seed $seed $FLAGS $extra)"
  command+=("$@")
}

finding() { # task, seed, flags ...: the same for a run that finds tickets
  training "$@"
  [ "$STEP" -eq 10 ] || command+=(--rate "$(share "$STEP")")
  [ -z "$LEVELS" ] || command+=(--levels "$LEVELS")
}

# Find tickets: iterative magnitude pruning; level 0 is the full BERT.
imp() { # task, seed, flags ...
  finding "$@"
  emit 1 "${command[@]}"
}

# The mask that `imp` with the same words leaves at a sparsity, in the variable `mask`.
declare -A run_dirs=()
ticket() { # sparsity in percent, task, seed, flags ...
  local percent=$1 most=$(((99 + STEP) / STEP))
  shift
  [ "$most" -le 10 ] || most=10
  [ $((percent % STEP)) -eq 0 ] || fail "no level removes $percent % of the weights where each removes $STEP %"
  [ $((percent / STEP)) -lt "${LEVELS:-$most}" ] ||
    fail "$percent % is removed at level $((percent / STEP)), and a run has ${LEVELS:-$most} levels: set LEVELS"
  run_dir "$@"
  mask=$(printf '%s/level_%02d/mask.safetensors' "$directory" $((percent / STEP)))
}

run_dir() { # task, seed, flags ...: the directory of `imp` with the same words, in the variable `directory`
  finding "$@"
  if [ -z "${run_dirs[$*]-}" ]; then
    run_dirs[$*]=$("${command[@]}" --dry-run | sed -n '1s/^would run in //p')
    [ -n "${run_dirs[$*]}" ] || fail "the command above was refused"
  fi
  directory=${run_dirs[$*]}
}

# Train a given ticket once.
given() { # task, seed, mask, flags ...
  local task=$1 seed=$2 mask=$3
  shift 3
  training "$task" "$seed" --mask "$mask" "$@"
  emit 2 "${command[@]}"
}

# Make a mask without training, in the variable `mask`.
oneshot() { # sparsity in percent, magnitude | random, seed
  local name=$2_$1
  [ "$2" = magnitude ] || name+=_s$3
  mask=$OUTPUT/masks/$name.safetensors
  command=("$PYTHON" oneshot.py --rate "$(share "$1")" --method "$2")
  [ "$2" = magnitude ] || command+=(--seed "$3")
  [ "$MODEL" = bert-base-uncased ] || command+=(--model "$MODEL")
  emit 1 "${command[@]}" --output "$mask"
}

# Make perturbed weights, in the variable `weights`.
perturbed() { # name, seed, flags ...
  weights=$OUTPUT/weights/$1_s$2.safetensors
  command=("$PYTHON" perturb_weight.py "${@:3}" --seed "$2")
  [ "$MODEL" = bert-base-uncased ] || command+=(--model "$MODEL")
  emit 1 "${command[@]}" --output "$weights"
}

cd "$here"
