# Functions for the sweeps (table2.sh, transfer.sh, ...), which source this file.
#
#   bash scripts/table2.sh                      runs the commands one after another; a second call resumes
#   bash scripts/table2.sh --dry-run            prints the commands, one per line, for scripts/sweep.py, xargs or a Slurm array
#   bash scripts/table2.sh --dry-run --stage 1  only the commands that need nothing of others; --stage 2 those that need
#                                               stage 1's; --stage 3 those that need stage 2's (importance.sh, stability.sh)
#
# Environment variables (MODEL=all-MiniLM-L6-v2 SEEDS="1 2" bash scripts/table2.sh):
#   SEEDS   the seeds                         MODEL       a BERT checkpoint
#   TASKS   the tasks                         FLAGS       flags of every training command
#   STEP    percent pruned per level          GLUE_FLAGS  SQUAD_FLAGS  MLM_FLAGS   flags of one training script
#   LEVELS  levels per run, 0 % included      OUTPUT      folder of runs, masks and weights
#   PYTHON  the interpreter                   TAMT_FLAGS  flags of mask training, IMP_FLAGS  of IMP (tamt*.sh)
#   PROTOCOL  paper or released, where the sweep has it
#   SEARCHES  s, heads, mlps, m (importance.sh, stability.sh)
#   EARLY_FLAGS  flags of EarlyBERT (earlybert*.sh)
# The FLAGS variables are split into words as the shell does it: FLAGS="--data-dir 'my data'" holds two words.

if [ $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1])) -lt 404 ]; then # associative arrays, and empty ones under `set -u`
  echo "error: the sweeps need bash 4.4 or newer, and this is $BASH_VERSION" >&2
  exit 2
fi
: "${MODEL:=bert-base-uncased}" "${STEP:=10}" "${OUTPUT:=runs}" "${PYTHON:=python}"
: "${FLAGS:=}" "${GLUE_FLAGS:=}" "${SQUAD_FLAGS:=}" "${MLM_FLAGS:=}" "${LEVELS:=}" "${TAMT_FLAGS:=}" "${IMP_FLAGS:=}"
: "${EARLY_FLAGS:=}"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=false stage_wanted='' failures=()
stop_signals='INT TERM HUP USR1 USR2 XCPU' # as in bert_tickets/signals.py

fail() { echo "error: $*" >&2; exit 2; }

describe() { # script, ...: their first comments, and the defaults of their variables, of which the first counts
  local script
  for script; do
    sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$script"
    echo
  done
  echo Defaults:
  grep -h '^: ' "$@" | grep -o '"${[A-Z_]*:=[^}][^}]*}"' | sed 's/^"${\(.*\):=\(.*\)}"$/  \1="\2"/' | awk -F= '!seen[$1]++'
}

while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --stage) [[ ${2-} =~ ^[123]$ ]] || fail "--stage must be 1, 2 or 3"; stage_wanted=$2; shift ;;
    -h | --help) describe "$0" "${BASH_SOURCE[0]}"; exit 0 ;;
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
case ${PROTOCOL:-paper} in
  paper) ;;
  released) ${has_protocols:-false} || fail "this sweep has no PROTOCOL=released; give FLAGS='--protocol released', and another OUTPUT" ;;
  *) fail "PROTOCOL=$PROTOCOL: must be paper or released" ;;
esac
given=" $FLAGS $GLUE_FLAGS $SQUAD_FLAGS $MLM_FLAGS $TAMT_FLAGS $IMP_FLAGS $EARLY_FLAGS "
case ${given//_/-} in
  *" --model"[\ =]* | *" --seed"[\ =]* | *" --output-dir"[\ =]*) fail "give --model, --seed and --output-dir by the variables MODEL, SEEDS and OUTPUT" ;;
  *" --task"[\ =]* | *" --init"[\ =]*) fail "a sweep chooses --task and --init itself" ;;
esac
case " $FLAGS $GLUE_FLAGS $SQUAD_FLAGS $MLM_FLAGS " in
  *" --rate"* | *" --levels"*) fail "give --rate and --levels by the variables STEP (percent) and LEVELS" ;;
  *" --method"* | *" --mask"*) fail "a sweep chooses --method and --mask itself" ;;
  *" --schedule"*) fail "a sweep uses --schedule linear: each level prunes STEP percent of the original weights" ;;
esac
if [ "$PWD" != "$here" ]; then # the commands run in the repository
  eval "words=($FLAGS $GLUE_FLAGS $SQUAD_FLAGS $MLM_FLAGS)"
  [[ $OUTPUT =~ ^(runs|runs_tamt|runs_(importance|earlybert)(_released)?|runs_earlybert_pretrain|/.*)$ ]] || fail "OUTPUT=$OUTPUT: give an absolute path, or start the sweep in $here"
  for word in "$MODEL" "${words[@]}"; do
    [[ ${word#--*=} = /* || ! -e ${word#--*=} ]] || fail "${word#--*=}: give an absolute path, or start the sweep in $here"
  done
fi
if ! $dry_run; then # report a mistake in the variables now, not after days of training
  bash "$0" --dry-run > /dev/null 2>&1 || { bash "$0" --dry-run > /dev/null || exit; }
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
  if [ $code -gt 128 ] && [[ " $stop_signals " = *" $(kill -l $code 2> /dev/null) "* ]]; then # one that the kernel killed has failed
    echo "stopped; the same command resumes" >&2
    exit $code
  elif [ $code -ne 0 ]; then
    failures+=("exit code $code: ${line% }")
  fi
}

# Run a command, and send it SIGTERM on a stop signal: otherwise bash ends and leaves it running. In a process group of its own,
# Ctrl-C does not reach it a second time. Returns its exit code.
forward_signals() { # command ...
  local child='' early='' code
  trap 'if [ -n "$child" ]; then kill -- "-$child" 2> /dev/null || true; else early=true; fi' $stop_signals
  set -m
  "$@" &
  child=$!
  set +m
  [ -z "$early" ] || kill -- "-$child"
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2> /dev/null; do :; done # a signal ends wait, not the child
  trap - $stop_signals
  return $code
}

# Make a table or figure when all runs have ended; a dry run only names the command.
at_end() { # command ...
  if $dry_run; then
    printf '# at the end: ' >&2
    printf '%q ' "$@" >&2
    echo >&2
  elif [ -z "$stage_wanted" ]; then
    emit last "$@"
  fi
}

# The same for the last table or figure, and list the failed commands.
finally() { # command ...
  at_end "$@"
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

# The command of a script, in the array `command`. Flags with their defaults are left out.
script() { # script, flags ...
  command=("$PYTHON" "$@")
  [ "$MODEL" = bert-base-uncased ] || command+=(--model "$MODEL")
}

training() { # task, seed, flags ...
  local task=$1 seed=$2
  shift 2
  case $task in
    mlm) script lt_pretrain.py; extra=$MLM_FLAGS ;;
    squad) script lt_squad.py; extra=$SQUAD_FLAGS ;;
    *) script lt_glue.py --task "$task"; extra=$GLUE_FLAGS ;;
  esac
  [ "$OUTPUT" = runs ] || command+=(--output-dir "$OUTPUT")
  eval "command+=(--seed $seed $FLAGS $extra)"
  command+=("$@")
}

finding() { # task, seed, flags ...: the same for a run of iterative magnitude pruning
  training "$@"
  [ "$STEP" -eq 10 ] || command+=(--rate "$(fraction "$STEP")")
  [ -z "$LEVELS" ] || command+=(--levels "$LEVELS")
}

# Set `words` to a command without some flags and their values.
without() { # pattern of the flags, words ...
  local pattern=$1 word skipped=false
  shift
  words=()
  for word in "$@"; do
    if $skipped; then
      skipped=false
    elif [[ $word =~ ^--($pattern)(=|$) ]]; then
      [[ $word = *=* ]] || skipped=true
    else
      words+=("$word")
    fi
  done
}

# Set `words` to a command without some flags that have no value.
without_switch() { # pattern of the flags, words ...
  local pattern=$1 word
  shift
  words=()
  for word in "$@"; do
    [[ $word =~ ^--(no[-_])?($pattern)$ ]] || words+=("$word")
  done
}

# Find tickets by iterative magnitude pruning. Level 0 is the full BERT.
imp() { # task, seed, flags ...
  finding "$@"
  emit 1 "${command[@]}"
}

# Set `directory` to the run directory of `command`.
declare -A run_dirs=()
run_directory() {
  if [ -z "${run_dirs[${command[*]}]-}" ]; then
    run_dirs[${command[*]}]=$("${command[@]}" --dry-run | sed -n '1s/^would run in //p')
    [ -n "${run_dirs[${command[*]}]}" ] || fail "the command above is not valid"
  fi
  directory=${run_dirs[${command[*]}]}
}

# Set `directory` to the run directory of `imp` with the same arguments, and `mask` to its mask file at a sparsity.
ticket() { # sparsity in percent, task, seed, flags ...
  local percent=$1 most=$(((99 + STEP) / STEP))
  shift
  [ "$most" -le 10 ] || most=10
  [ $((percent % STEP)) -eq 0 ] || fail "no level has $percent % sparsity: each prunes $STEP %"
  [ $((percent / STEP)) -lt "${LEVELS:-$most}" ] ||
    fail "$percent % is level $((percent / STEP)), and a run has ${LEVELS:-$most} levels: set LEVELS"
  finding "$@"
  run_directory
  mask=$(printf '%s/level_%02d/mask.safetensors' "$directory" $((percent / STEP)))
}

# Train a given ticket once (--mask means --method transfer).
given() { # task, seed, mask, flags ...
  training "${@:1:2}" --mask "${@:3}"
  emit 2 "${command[@]}"
}

# Make a mask without training, and set `mask` to its file.
oneshot() { # sparsity in percent, magnitude | random, seed, flags ...
  script oneshot.py --rate "$(fraction "$1")" --method "$2" "${@:4}"
  mask=$OUTPUT/masks/${4:+tamt_}$2_$1.safetensors
  if [ "$2" = random ]; then
    command+=(--seed "$3")
    mask=${mask%.safetensors}_s$3.safetensors
  fi
  emit 1 "${command[@]}" --output "$mask"
}

# Make perturbed weights, and set `weights` to their file.
perturbed() { # name, seed, flags ...
  weights=$OUTPUT/weights/$1_s$2.safetensors
  script perturb_weight.py "${@:3}" --seed "$2"
  emit 1 "${command[@]}" --output "$weights"
}

# ---- mask training (tamt*.sh) ----

covering=(--prunable matrices+embeddings --scope tensor) # the 74 matrices that TAMT prunes, each by itself

# Find tickets by IMP on MLM with TAMT's covering; sets `mask` at a sparsity.
imp_mlm() { # sparsity in percent, seed, steps per level
  eval "flags=($IMP_FLAGS)"
  imp mlm "$2" "${covering[@]}" --max-steps "$3" "${flags[@]}"
  ticket "$1" mlm "$2" "${covering[@]}" --max-steps "$3" "${flags[@]}"
}

# Set `steps` to those of IMP up to a sparsity: the first STEP percent are pruned before training. To the nearest multiple of EVERY.
imp_steps() { # sparsity in percent, steps per level
  steps=$((($1 - STEP) * $2 / STEP))
  steps=$(((steps + EVERY / 2) / EVERY * EVERY))
  [ $steps -gt 0 ] || steps=$EVERY
}

# Train a mask, up to the steps that IMP needs; sets `mask` to the ticket, or to the mask saved at a step on the way.
mask_training() { # sparsity in percent, objective, seed, [step]
  imp_steps "$1" "$INTERVAL"
  training mlm "$3" --method mask-training --sparsity "$(fraction "$1")" --objective "$2" --ticket-step $steps
  eval "command+=($TAMT_FLAGS)"
  emit 1 "${command[@]}"
  run_directory
  mask=$directory/level_00/mask.safetensors
  [ "${4:-$steps}" -eq $steps ] || mask=$(printf '%s/masks/step_%07d.safetensors' "$directory" "$4")
}

# Train the ticket `mask` RUNS times on each task, with seeds of its own: the seed of the mask, and 10, 20, ... more.
train_ticket() { # seed of the mask
  local task i
  for task in $TASKS; do
    for ((i = 0; i < RUNS; i++)); do
      given $task $(($1 + 10 * i)) "$mask"
    done
  done
}

# Compute the MLM loss and the distance of the hidden states of the ticket `mask`, without training it.
score() { # seed
  training mlm "$1" --score --mask "$mask"
  emit_scoring 2
}

# Run or print a command that scores, without the flags of training, which have no effect on it.
emit_scoring() { # stage
  without 'epochs|max[-_]steps|lr|weight[-_]decay|eval[-_]steps|report' "${command[@]}"
  emit "$1" "${words[@]}"
}

# ---- heads and MLPs (importance.sh, stability.sh) ----

# Fine-tune and prune while the score holds. Sets `mask` to the good ticket, and `weights` to the fine-tuned network.
searched() { # task, seed, s | heads | mlps | m
  case $3 in
    s) training "$1" "$2" --method importance ;;
    heads | mlps) training "$1" "$2" --method importance --units "$3" ;;
    m) training "$1" "$2" --method guarded-magnitude ;;
    *) fail "SEARCHES=$SEARCHES: each is s, heads, mlps or m" ;;
  esac
  emit 1 "${command[@]}"
  run_directory
  mask=$directory/level_01/mask.safetensors weights=$directory/level_00/weights.safetensors
}

# Derive a ticket from others; sets `mask`. The seed names the file: "" for one ticket of all seeds.
derived() { # name of the good tickets, kind, seed, masks and flags ...
  mask=$OUTPUT/masks/$1_$2${3:+_s$3}.safetensors
  emit 2 "$PYTHON" scripts/derive.py "$2" "${@:4}" --output "$mask"
}

# Score the ticket `mask` as it stands on the fine-tuned `weights`.
scored() { # stage, task, seed
  training "$2" "$3" --score --mask "$mask" --weights "$weights"
  emit_scoring "$1"
}

# Both, for a derived ticket.
pruned_and_retrained() { # task, seed, flags of the training ...
  scored 3 "$1" "$2"
  retrained 3 "$@"
}

# Fine-tune the ticket `mask` from the pre-trained weights.
retrained() { # stage, task, seed, flags ...
  training "$2" "$3" --mask "$mask" "${@:4}"
  emit "$1" "${command[@]}"
}

# ---- EarlyBERT (earlybert*.sh) ----

# Train the full BERT: its presets' epochs and learning rate, and the batch size of EarlyBERT's preset, unless a variable gives one.
full_bert() { # task, seed, flags ...
  local size=()
  case $1 in
    mlm) ;; # has the same
    squad) [[ "$FLAGS $SQUAD_FLAGS" =~ --batch[-_]size ]] || size=(--batch-size 48) ;;
    *) [[ "$FLAGS $GLUE_FLAGS" =~ --batch[-_]size ]] || size=(--batch-size 128) ;;
  esac
  training "${@:1:2}" --levels 1 "${size[@]}" "${@:3}"
  emit 1 "${command[@]}"
}

# Search, draw and train a ticket of EarlyBERT; or another ticket, on which the EARLY_FLAGS of a search have no effect.
early_bird() { # task, seed, flags ...
  local of_search='search[-_](lr|epochs)|draw[-_](when|every)|lambda[-_](heads|neurons)|record|rank|record[-_]epochs'
  eval "flags=($EARLY_FLAGS)"
  case " ${*:3} " in
    *" --ticket random "*) without "$of_search|draw[-_]at" "${flags[@]}"; without_switch 'whole[-_]search' "${words[@]}" ;;
    *" --ticket full "*) without "$of_search|execution" "${flags[@]}"; without_switch 'whole[-_]search|keep[-_]gates' "${words[@]}" ;;
    *) words=("${flags[@]}") ;;
  esac
  flags=("${words[@]}")
  [ "${PROTOCOL:-paper}" = paper ] || flags+=(--protocol "$PROTOCOL")
  training "${@:1:2}" --method early-bird "${flags[@]}" "${@:3}"
  emit 1 "${command[@]}"
}

cd "$here"
