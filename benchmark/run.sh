#!/usr/bin/env bash
# Runs a grid of scripts x environments x seeds, on this machine or as a Slurm job array.
#
#   benchmark/run.sh quick                      all four scripts, small and short: under half an
#                                               hour on 2 cores
#   benchmark/run.sh mujoco --seeds "1 2 3"     a part of a preset
#   benchmark/run.sh mujoco --launcher slurm --partition gpu --gpus 1 --time 24:00:00 --jobs 50
#   benchmark/run.sh --scripts "crossq_sac sac_baseline" --envs "Hopper-v4 Ant-v4" --steps 100000
#   benchmark/run.sh --setting "crossq_sac --brn-warmup 5000" --envs Hopper-v4 --seeds "1 2"
#   benchmark/run.sh --setting "ablate crossq_sac --critic-norm ln" --envs my_module:MyEnv-v0
#
# The same call again skips the runs that have finished, resumes the others and starts the rest.
# With a larger --steps it takes the finished ones further. Ctrl-C and SIGTERM let every run write a
# checkpoint first. A run that fails stops no other.
#
# Presets. What is given besides replaces their parts; --flags is added to them:
#   mujoco       CrossQ's figure 5: crossq_sac, crossq_td3, sac_baseline, redq, droq and td3 on its
#                MuJoCo tasks; 10 seeds of 1M steps
#   rivals       redq, droq, td3, sac_baseline and 256 wide crossq_sac on two of these tasks, small
#                enough for a CPU: 2 seeds of 30 000 steps. redq and droq take hours each
#   dmc          figure 3 of CrossQ + WN: crossq_wn_highutd at UTD 1, 2 and 5, crossq_sac,
#                sac_baseline, bro, bro --fast and sr_sac on its 15 DeepMind Control tasks; 10 seeds
#                of 1M steps
#   myosuite     the same on its 10 MyoSuite tasks
#   ablations    CrossQ's ablations, and REDQ's and DroQ's (figures 14 and 15), on its MuJoCo tasks;
#                5 seeds of 1M steps
#   utd-scaling  crossq_wn_highutd at UTD 1, 2 and 5, with and without weight normalisation, on the
#                tasks of dmc; 10 seeds of 1M steps
#   quick        all four scripts on two cheap tasks, 256 wide; 3 seeds of 5000 steps, and plots at
#                the end. Updates begin at step 1000, those of the published runs at 5000.
#                crossq_wn_highutd has UTD 2, and the learning rates and the target entropy of its
#                paper's second version
#
# What to run:
#   --scripts "A B"   of the four, or of benchmark/algorithms
#   --envs "E F"   --seeds "1 2" (default: 1)
#   --steps N                  environment steps (default: 1000000)
#   --setting "A --flag ..."   one more script, with flags of its own; may be repeated.
#                              "ablate A --flag ..." runs it through benchmark/ablate.py, for the
#                              flags that this adds
#   --flags "..."              flags for every run; they replace those of a setting
# Where and how:
#   --out DIR          the runs are DIR/runs/NAME, or DIR/NAME if DIR is called runs (the default)
#   --workers N        runs at a time (default: the visible GPUs x --jobs-per-gpu; without GPUs, the
#                      number of CPUs)
#   --jobs-per-gpu N   (default: 1)
#   --dry-run          only print the commands
#   --launcher slurm   submit one job array with a run per task; at its time limit a task is
#                      requeued, and then it resumes. Slurm's MaxArraySize is 1001 by default:
#                      larger grids go by parts, see --seeds
#   --partition --gpus --time --account    are handed to sbatch, for each run
#   --jobs N                               at most N tasks at a time
#   --sbatch "..."     more options for sbatch, for example "--cpus-per-task=2 --mem=8G"
#
# NAME is ENV__SCRIPT+FLAGS__SEED. In a run's folder, log.txt is its output; `finished` marks its
# end and holds the number of steps. The environment variable PYTHON is the interpreter (default:
# python). Exit code: 0 if all runs have finished (with Slurm: if they are submitted), 1 if not all
# have, 2 after a wrong argument, 130 or 143 after a signal.

set -euo pipefail -f # -f: lists are split into words, but never globbed
self=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
root=$(dirname "$(dirname "$self")") python=${PYTHON:-python} arguments=("$@")
preset='' scripts='' settings=() envs='' seeds='' steps='' flags=''
out=runs workers='' jobs_per_gpu=1 dry_run=''
# shellcheck disable=SC2034 # submit reads partition, gpus, time and account by name
launcher=local partition='' gpus='' time='' account='' jobs='' sbatch='' task=''

die() {
  echo "run.sh: error: $*" >&2
  exit 2
}

while (($#)); do
  case $1 in
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "$self"
      exit ;;
    --dry-run) dry_run=1 ;;
    mujoco | rivals | dmc | myosuite | ablations | utd-scaling | quick)
      [[ -z $preset ]] || die "one preset at a time, not $preset and $1"
      preset=$1 ;;
    # --task is for Slurm's array: see submit.
    --scripts | --setting | --envs | --seeds | --steps | --flags | --out | --workers | \
      --jobs-per-gpu | --launcher | --partition | --gpus | --time | --account | --jobs | \
      --sbatch | --task)
      (($# > 1)) || die "$1 needs a value"
      option=${1#--}
      if [[ $option = setting ]]; then settings+=("$2"); else printf -v "${option//-/_}" %s "$2"; fi
      shift ;;
    *) die "unknown argument $1; see --help" ;;
  esac
  shift
done

# ----------------------------------------------------------------------------------------- the grid

default() { # VARIABLE VALUE: unless it was given
  [[ -n ${!1} ]] || printf -v "$1" %s "$2"
}

with() { # SETTING...: unless scripts were given; the words after a script's name are flags for it
  [[ -n $scripts$own ]] || settings+=("$@")
}

own=${settings[*]-}
for script in $scripts; do settings+=("$script"); done
mujoco="Hopper-v4 Walker2d-v4 Ant-v4 HalfCheetah-v4 Humanoid-v4 HumanoidStandup-v4"
dmc=$(printf 'dm_control/%s-v0 ' dog-{stand,walk,trot,run} humanoid-{stand,walk,run} cheetah-run \
  walker-run hopper-{stand,hop} finger-turn_hard quadruped-run fish-swim pendulum-swingup)
figure_3=("crossq_wn_highutd --utd "{1,2,5} crossq_sac sac_baseline bro "bro --fast" sr_sac)
case $preset in
  mujoco)
    default envs "$mujoco"
    with crossq_sac crossq_td3 sac_baseline redq droq td3 ;;
  rivals)
    default envs "HalfCheetah-v4 Hopper-v4"
    default seeds "1 2"
    default steps 30000
    flags="--eval-every 5000 $flags"
    with "crossq_sac --critic-width 256" sac_baseline td3 redq droq ;;
  dmc)
    default envs "$dmc"
    with "${figure_3[@]}" ;;
  myosuite)
    default envs "$(echo myoHand{Reach,Pose,ObjHold,KeyTurn,PenTwirl}{Fixed,Random}-v0)"
    with "${figure_3[@]}" ;;
  ablations)
    default envs "$mujoco"
    default seeds "1 2 3 4 5"
    with crossq_sac "crossq_sac --"{"critic-width 256","adam-beta1 0.9"} \
      "crossq_sac --"{"policy-delay 1","n-critics 1"}
    with "ablate crossq_sac --"{"bn-momentum 0.9","actor-norm none",bootstrap-at-termination}
    with "ablate crossq_sac --critic-norm "{bn,ln,none} # figures 9, 10 and 13
    with sac_baseline "sac_baseline --"{"critic-width 2048","utd 20 --policy-delay 20"}
    for rival in redq droq; do # figures 14 and 15
      with $rival "$rival --critic-width 2048" "$rival --adam-beta1 0.5" \
        "$rival --critic-width 2048 --adam-beta1 0.5"
    done
    # Figure 9; live: figure 13.
    with "ablate sac_baseline --critic-norm brn --target-stats "{own,live}
    # Figure 16.
    with "ablate sac_baseline --tau 1 --activation "{relu,tanh,relu6,sin,elu,glu} \
      "ablate sac_baseline --tau 1 --activation "{relu-over-max,layernormed-relu} ;;
  utd-scaling)
    default envs "$dmc"
    with "crossq_wn_highutd --utd "{1,2,5} \
      "ablate crossq_wn_highutd --weight-norm none --utd "{1,2,5} ;;
  quick)
    default envs "InvertedPendulum-v4 HalfCheetah-v4"
    default seeds "1 2 3"
    default steps 5000
    flags="--learning-starts 1000 --eval-every 1000 --eval-episodes 3 --compile off $flags"
    flags="--critic-width 256 $flags"
    wn="--utd 2 --critic-lr 3e-4 --actor-lr 3e-4 --entropy-factor 0.5"
    with crossq_sac crossq_td3 "crossq_wn_highutd $wn" sac_baseline ;;
  *) default seeds 1 ;;
esac
# CrossQ + WN's paper evaluates every 25 000 steps.
[[ ! $preset =~ ^(dmc|myosuite|utd-scaling)$ ]] || flags="--eval-every 25000 $flags"
default seeds "1 2 3 4 5 6 7 8 9 10"
default steps 1000000
[[ -n ${settings[*]-} && -n $envs ]] ||
  die "nothing to run: give a preset, or --scripts and --envs; see --help"
for option in steps jobs_per_gpu ${workers:+workers} ${jobs:+jobs}; do
  [[ ${!option} =~ ^[1-9][0-9]*$ ]] ||
    die "--${option//_/-} must be a positive whole number, not ${!option}"
done
[[ $launcher =~ ^(local|slurm)$ ]] || die "--launcher is local or slurm, not $launcher"

# The scripts write to runs/NAME below their current directory. In this one may be the user's own
# environments, which they must still find.
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD
[[ $python != */* ]] || python=$(realpath -s "$python")
# glibc keeps freed memory: on a CPU, clearing fresh pages slows the updates of wide critics.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647
[[ ! -e $out || -d $out ]] || die "--out $out is no folder"
out=$(realpath -m "$out") cwd=$out
[[ ${cwd##*/} != runs ]] || cwd=${cwd%/*}
runs=$cwd/runs

# last_wins WORD...: sets words, without a flag and its value where the same flag comes again.
last_wins() {
  local word flag kept=1
  local -A later=()
  for word; do
    flag=${word%%=*} flag=${flag//_/-}
    [[ $flag != --* ]] || later[$flag]=$((${later[$flag]-0} + 1))
    [[ ! $flag =~ ^--(env-id|seed|total-timesteps|run-name|resume|evaluate)$ ]] ||
      die "$flag is no flag for a setting: there are --envs, --seeds, --steps and --out"
  done
  words=()
  for word; do
    flag=${word%%=*} flag=${flag//_/-}
    if [[ $flag = --* ]]; then
      later[$flag]=$((later[$flag] - 1)) kept=''
      ((later[$flag])) || kept=1
    fi
    [[ -z $kept ]] || words+=("$word")
  done
}

# name_run ENV SEED WORD...: sets name, from all that makes it another run. What a resume may change
# does not.
name_run() {
  local env=$1 seed=$2 word kept=1
  shift 2
  name=''
  for word; do
    if [[ $word = --* ]]; then
      [[ ${word%%=*} =~ ^--(device|compile|eval-every|eval-episodes|checkpoint-every|track)$ ]] &&
        kept='' || kept=1
      name+=${kept:++${word#--}}
    elif [[ $name = *+* ]]; then
      name+=${kept:+"=$word"}
    else
      name+=${kept:+${name:+_}$word}
    fi
  done
  name=${env}__${name}__$seed
  name=${name//[^A-Za-z0-9._+=-]/_}
}

names=() commands=() todo=()
declare -A seen=()
for seed in $seeds; do # outermost, so that one seed of everything comes first
  for env in $envs; do
    for setting in "${settings[@]}"; do
      read -ra words <<<"$setting $flags"
      program=("$python")
      if [[ ${words[0]} = ablate ]]; then
        program+=("$root/benchmark/ablate.py")
        words=("${words[@]:1}")
      fi
      script=${words[0]-} script=${script%.py} file=$root/$script.py
      [[ -e $file ]] || file=$root/benchmark/algorithms/$script.py
      [[ -n $script ]] || die "a setting begins with a script's name, unlike '$setting'"
      [[ -e $file ]] || die "there is no script $script.py in $root or benchmark/algorithms"
      last_wins "${words[@]:1}"
      name_run "$env" "$seed" ${program[1]+ablate} "$script" ${words[@]+"${words[@]}"}
      ((${#name} <= 255)) || die "a run's name is too long for a folder: $name"
      [[ -z ${seen[$name]-} ]] || continue
      seen[$name]=1 names+=("$name")
      program+=("$file" --env-id "$env" --seed "$seed" --total-timesteps "$steps")
      program+=(${words[@]+"${words[@]}"})
      printf -v command '%q ' "${program[@]}" # quoted: eval gives the words back
      commands+=("$command")
    done
  done
done

# ------------------------------------------------------------------------------------------ one run

finished() { # NAME: it has ended by itself, after so many steps at least
  local reached=''
  [[ -e $runs/$1/finished ]] && read -r reached <"$runs/$1/finished" &&
    [[ $reached =~ ^[0-9]+$ ]] && ((reached >= steps))
}

command_of() { # I: its whole command line
  if [[ -e $runs/${names[$1]}/checkpoint.pt ]]; then
    printf '%s--resume %q' "${commands[$1]}" "runs/${names[$1]}"
  else
    printf '%s--run-name %q' "${commands[$1]}" "${names[$1]}"
  fi
}

# run_one I SIGNAL [setsid]: starts or resumes run I and waits for its end, in a shell of its own.
# A second signal ends a script at once, without a checkpoint, so a run must hear of only one: the
# first SIGNAL to this shell is passed on as a SIGTERM. With setsid the run has a session of its
# own, which Ctrl-C does not reach.
run_one() {
  local folder=$runs/${names[$1]} line code=0
  stopped='' child='' # global: the trap outlives this function
  trap 'stopped=1' TERM # unless SIGNAL is TERM: see run_task
  # In one command, because a second SIGNAL may interrupt this between two.
  trap '((stopped++)) || [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' "$2"
  trap '' INT HUP # the terminal sends them to every shell; run.sh then sends a SIGTERM
  mkdir -p "$folder"
  # The log is the run's lock too. The run holds it as long as it lives, even if this shell is
  # killed, so it is not started twice. A file system without locks has to do without.
  exec 9>>"$folder/log.txt"
  if flock -n -E 75 9 || [[ $? != 75 ]]; then :; else
    echo "${names[$1]} is being run by another process" >&2
    return 75
  fi
  finished "${names[$1]}" && return
  line=$(command_of "$1")
  echo "== $(date '+%F %T') in $cwd: $line" >&9
  cd "$cwd"
  eval "exec ${3-} $line" </dev/null >&9 2>&1 &
  child=$!
  [[ -z $stopped ]] || kill -TERM "$child" 2>/dev/null || true
  while :; do # `wait` returns early at a signal
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  [[ $code != 0 ]] || echo "$steps" >"$folder/finished"
  return "$code"
}

# ---------------------------------------------------------------------------------- on this machine

clock() { printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }

stop() { # CODE: let the runs write their checkpoints; no other is started
  stopped=$1
  echo "stopping ${#slots[@]} runs; the same call goes on"
  ((${#slots[@]} == 0)) || kill -TERM "${!slots[@]}" 2>/dev/null || true
}

reap() { # wait until a run ends, and report all that have
  local pid i name took left
  wait -n || true # by pid, not by `wait -n -p`, which needs bash 5.1
  for pid in "${!slots[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then continue; fi
    i=${run_of[$pid]} took=$((SECONDS - started[$pid])) busy[${slots[$pid]}]=''
    name=${names[$i]}
    unset "slots[$pid]"
    if finished "$name"; then
      ended=$((ended + 1)) spent=$((spent + took))
      left=$((${#todo[@]} - ended - ${#failed[@]}))
      echo "[$((before + ended))/${#names[@]}] finished $name in $(clock $took)," \
        "about $(clock $(((spent * left / ended + workers - 1) / workers))) left"
    elif [[ -n $stopped ]]; then
      echo "stopped  $name after $(clock $took)"
    else
      failed+=("$name")
      echo "FAILED   $name after $(clock $took): $runs/$name/log.txt"
    fi
  done
}

run_here() {
  local i slot pid cards=() mask
  if [[ " $flags " != *" --device cpu "* ]]; then
    if [[ -n ${CUDA_VISIBLE_DEVICES+given} ]]; then
      IFS=, read -ra cards <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
      mapfile -t cards < <(nvidia-smi --query-gpu=index --format=csv,noheader | grep -x '[0-9]*')
    fi
  fi
  [[ ${cards[0]-} != -1 ]] || cards=() # CUDA_VISIBLE_DEVICES=-1 hides them all
  # nproc would take OMP_NUM_THREADS for the number of CPUs
  default workers $((${#cards[@]} ? ${#cards[@]} * jobs_per_gpu : $(env -u OMP_NUM_THREADS nproc)))
  ((workers == 1)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  echo "${#names[@]} runs in $runs, $before of them finished;" \
    "$workers at a time${cards[0]+ on ${#cards[@]} GPUs}"
  declare -gA slots=() run_of=() started=()
  declare -ga busy=() failed=()
  stopped='' ended=0 spent=0
  trap 'stop 130' INT
  trap 'stop 143' TERM
  trap 'stop 129' HUP
  for i in "${todo[@]}"; do
    while [[ -z $stopped ]] && ((${#slots[@]} >= workers)); do reap; done
    [[ -z $stopped ]] || break
    slot=0
    while [[ -n ${busy[$slot]-} ]]; do slot=$((slot + 1)); done
    mask=${cards[0]+${cards[$((slot % ${#cards[@]}))]}}
    echo "start    ${names[$i]}${mask:+ on GPU $mask}"
    (
      [[ -z $mask ]] || export CUDA_VISIBLE_DEVICES=$mask
      run_one "$i" TERM setsid
    ) &
    pid=$! busy[slot]=1
    slots[$pid]=$slot run_of[$pid]=$i started[$pid]=$SECONDS
    [[ -z $stopped ]] || kill -TERM "$pid" 2>/dev/null || true # the signal came just before
  done
  while ((${#slots[@]})); do reap; done
  echo "$((before + ended)) of ${#names[@]} runs finished, in $(clock $SECONDS)"
  ((${#failed[@]} == 0)) || echo "failed: ${#failed[@]}"
  for name in ${failed[@]+"${failed[@]}"}; do
    printf '  %s\n    %s\n' "$runs/$name/log.txt" "$(grep -a '[[:alpha:]]' "$runs/$name/log.txt" | grep -v 'full helptext' | tail -n 1)"
  done
  [[ -z $stopped ]] || exit "$stopped"
  ((${#failed[@]} == 0)) || exit 1
}

# ----------------------------------------------------------------------------------------- on Slurm

submit() { # one array, whose indices are those of the unfinished runs
  local options name o
  name=crossq-$(cksum <<<"$runs" | cut -d ' ' -f 1)
  options=(--parsable "--job-name=$name" "--output=$runs/slurm-%A_%a.log" --open-mode=append
    --requeue --signal=B:USR1@60 "--array=$(IFS=, && echo "${todo[*]}")${jobs:+%$jobs}")
  for o in partition gpus time account; do [[ -z ${!o} ]] || options+=("--$o=${!o}"); done
  # shellcheck disable=SC2206 # --sbatch is a list of words
  options+=($sbatch)
  if [[ -n $dry_run ]]; then
    echo "sbatch ${options[*]}"
    return
  fi
  command -v sbatch >/dev/null || die "--launcher slurm: there is no sbatch here"
  [[ -z $(squeue -h -n "$name" -u "$(id -un)") ]] ||
    die "an array of $runs is still queued: squeue -n $name"
  mkdir -p "$runs"
  sbatch "${options[@]}" <<END
#!/usr/bin/env bash
exec $(printf '%q ' bash "$self" "${arguments[@]}")--task "\$SLURM_ARRAY_TASK_ID"
END
  echo "submitted ${#todo[@]} of ${#names[@]} runs to $runs;" \
    "watch: squeue -n $name; stop: scancel -n $name"
}

run_task() { # one of the array's, in its batch shell
  local begun code=0 checkpoint=$runs/${names[$task]}/checkpoint.pt
  # One of the tasks has the SLURM_JOB_ID of the whole array, so it is not used here.
  local job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  begun=$(date +%s)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # Before its time limit, this shell alone gets a SIGUSR1, see submit. A SIGTERM, of a pre-emption
  # or of scancel, goes to all processes of the job, so the run has got it too.
  run_one "$task" USR1 || code=$?
  # If the job still counts as running, the task is to run again: Slurm itself does not requeue it.
  # Not if the time was too short to get anywhere, though.
  if [[ -n $stopped && $code != 0 && $(scontrol show job -o "$job") = *JobState=RUNNING* ]] &&
    [[ -e $checkpoint ]] && (($(stat -c %Y "$checkpoint") >= begun)); then
    echo "${names[$task]}: stopped with a checkpoint; requeued"
    scontrol requeue "$job"
  fi
  exit "$code"
}

[[ -z $task ]] || run_task
for i in "${!names[@]}"; do finished "${names[$i]}" || todo+=("$i"); done
before=$((${#names[@]} - ${#todo[@]}))
if [[ -n $dry_run ]]; then
  [[ $launcher = local ]] || ((${#todo[@]} == 0)) || submit
  echo "# ${#names[@]} runs, $before of them finished; in $cwd:"
  for i in ${todo[@]+"${todo[@]}"}; do command_of "$i" && echo; done
elif ((${#todo[@]} == 0)); then
  echo "all ${#names[@]} runs in $runs have finished"
elif [[ $launcher = slurm ]]; then
  submit
else
  run_here
fi
if [[ $preset$launcher = quicklocal && -z $dry_run ]]; then
  "$python" "$root/benchmark/plot.py" --runs "$runs" --out "$out"
fi
