# Functions for the sweeps (table2.sh, transfer.sh, ...), which source this file.
#
#   bash scripts/table2.sh                      runs the commands one after another; a second call resumes
#   bash scripts/table2.sh --dry-run            prints the commands, one per line, for scripts/sweep.py, xargs or a Slurm array
#   bash scripts/table2.sh --dry-run --stage 1  only the commands that need no other's ticket; --stage 2 those that do
#
# Environment variables (MODEL=all-MiniLM-L6-v2 SEEDS="1 2" bash scripts/table2.sh):
#   SEEDS   the seeds                         MODEL       a BERT checkpoint
#   TASKS   the tasks                         FLAGS       flags of every training command
#   STEP    percent pruned per level          GLUE_FLAGS  SQUAD_FLAGS  MLM_FLAGS   flags of one training script
#   LEVELS  levels per run, 0 % included      OUTPUT      folder of runs, masks and weights
#   PYTHON  the interpreter
# The FLAGS variables are split into words as the shell does it: FLAGS="--data-dir 'my data'" holds two words.

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
    --stage) [[ ${2-} =~ ^[123]$ ]] || fail "--stage must be 1, 2 or 3"; stage_wanted=$2; shift ;;
    -h | --help) for file in "$0" "${BASH_SOURCE[0]}"; do sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$file"; echo; done; exit 0 ;;
    *) fail "unknown flag $1; a sweep has --dry-run, --stage N and --help" ;;
  esac
  shift
done
need_percent() { # variable, value
  [[ $2 =~ ^[1-9][0-9]?$ ]] || fail "$1=$2: must be a whole number of percent from 1 to 99"
}
need_percent STEP "$STEP"
for percent in ${SPARSITY-}; do need_percent SPARSITY "$percent"; done
for percent in ${SPARSITIES-}; do need_percent SPARSITIES "$percent"; done
[[ $LEVELS =~ ^([1-9][0-9]*)?$ ]] || fail "LEVELS=$LEVELS: must be a whole number"
case " $FLAGS $GLUE_FLAGS $SQUAD_FLAGS $MLM_FLAGS " in
  *" --rate"* | *" --levels"*) fail "give --rate and --levels by the variables STEP (percent) and LEVELS" ;;
  *" --method"* | *" --mask"*) fail "a sweep chooses --method and --mask itself" ;;
  *" --schedule"*) fail "a sweep uses --schedule linear: each level prunes STEP percent of the original weights" ;;
esac
if ! $dry_run; then # report a mistake in the variables now, not after days of training
  bash "$0" ${arguments[@]+"${arguments[@]}"} --dry-run > /dev/null 2>&1 || exec bash "$0" --dry-run > /dev/null
fi

# Run or print one command of the sweep, once. A failed command is listed at the end and does not stop the others; a stopped one
# ends the sweep. Commands of stage 1 need no other, those of stages 2 and 3 need the previous stage.
declare -A seen=()
emit() { # stage, command ...
  local stage=$1 code=0 line
  shift
  printf -v line '%q ' "$@"
  [ -z "${seen[$line]-}" ] || return 0
  seen[$line]=1
  [ -z "$stage_wanted" ] || [ "$stage_wanted" = "$stage" ] || return 0
  if $dry_run; then
    echo "${line% }"
    return
  fi
  printf '\n$ %s\n' "${line% }"
  forward_signals "$@" || code=$?
  if [ $code -eq 130 ] || [ $code -eq 143 ]; then # Ctrl-C, SIGTERM; a command that the kernel killed (137) has failed
    echo "stopped; the same command resumes" >&2
    exit $code
  elif [ $code -ne 0 ]; then
    failures+=("exit code $code: ${line% }")
  fi
}

# Run a command and forward SIGINT, SIGTERM and SIGHUP to it: otherwise bash ends and leaves it running. A separate process group
# makes Ctrl-C reach it once. Returns its exit code.
forward_signals() { # command ...
  local child code signal
  set -m
  "$@" &
  child=$!
  set +m
  for signal in INT TERM HUP; do trap "kill -$signal -- -$child 2> /dev/null" "$signal"; done
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2> /dev/null; do :; done # a signal ends wait, not the child
  trap - INT TERM HUP
  return $code
}

# Make the table or figure when all runs have ended, and list the failed commands; a dry run only names the command.
finally() { # command ...
  if $dry_run; then
    printf '# at the end: ' >&2
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

fraction() { # percent
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

finding() { # task, seed, flags ...: the same for a run of iterative magnitude pruning
  training "$@"
  [ "$STEP" -eq 10 ] || command+=(--rate "$(fraction "$STEP")")
  [ -z "$LEVELS" ] || command+=(--levels "$LEVELS")
}

# Find tickets by iterative magnitude pruning. Level 0 is the full BERT.
imp() { # task, seed, flags ...
  finding "$@"
  emit 1 "${command[@]}"
}

# Set `mask` to the mask file that `imp` with the same arguments writes at a sparsity.
declare -A run_dirs=()
ticket() { # sparsity in percent, task, seed, flags ...
  local percent=$1 most=$(((99 + STEP) / STEP))
  shift
  [ "$most" -le 10 ] || most=10
  [ $((percent % STEP)) -eq 0 ] || fail "no level has $percent % sparsity: each prunes $STEP %"
  [ $((percent / STEP)) -lt "${LEVELS:-$most}" ] ||
    fail "$percent % is level $((percent / STEP)), and a run has ${LEVELS:-$most} levels: set LEVELS"
  run_dir "$@"
  mask=$(printf '%s/level_%02d/mask.safetensors' "$directory" $((percent / STEP)))
}

run_dir() { # task, seed, flags ...: set `directory` to the run directory of `imp` with the same arguments
  finding "$@"
  if [ -z "${run_dirs[$*]-}" ]; then
    run_dirs[$*]=$("${command[@]}" --dry-run | sed -n '1s/^would run in //p')
    [ -n "${run_dirs[$*]}" ] || fail "the command above is not valid"
  fi
  directory=${run_dirs[$*]}
}

# Train a given ticket once (--mask means --method transfer).
given() { # task, seed, mask, flags ...
  local task=$1 seed=$2 mask=$3
  shift 3
  training "$task" "$seed" --mask "$mask" "$@"
  emit 2 "${command[@]}"
}

# Make a mask without training, and set `mask` to its file.
oneshot() { # sparsity in percent, magnitude | random, seed
  local name=$2_$1
  [ "$2" = magnitude ] || name+=_s$3
  mask=$OUTPUT/masks/$name.safetensors
  command=("$PYTHON" oneshot.py --rate "$(fraction "$1")" --method "$2")
  [ "$2" = magnitude ] || command+=(--seed "$3")
  [ "$MODEL" = bert-base-uncased ] || command+=(--model "$MODEL")
  emit 1 "${command[@]}" --output "$mask"
}

# Make perturbed weights, and set `weights` to their file.
perturbed() { # name, seed, flags ...
  weights=$OUTPUT/weights/$1_s$2.safetensors
  command=("$PYTHON" perturb_weight.py "${@:3}" --seed "$2")
  [ "$MODEL" = bert-base-uncased ] || command+=(--model "$MODEL")
  emit 1 "${command[@]}" --output "$weights"
}

cd "$here"
