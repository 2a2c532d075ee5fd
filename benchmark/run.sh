#!/usr/bin/env bash
# Runs a grid of scripts x environments x seeds, on this machine or as one Slurm job array.
#
#   benchmark/run.sh quick                        all four scripts, short: half an hour on 2 cores
#   benchmark/run.sh mujoco --seeds "1 2 3" --slurm "--partition=gpu --gpus=1 --time=24:00:00"
#   benchmark/run.sh --setting "crossq_sac --utd 2" --setting sac_baseline --envs "Ant-v4 Hopper-v4"
#   benchmark/run.sh --setting "ablate crossq_sac --critic-norm ln" --envs my_module:MyEnv-v0
#
# The same call again skips finished runs, resumes those with a checkpoint and starts the others.
# With a larger --steps it takes finished runs further. A failing run stops no other.
#
# A preset is the first argument. Your lists replace its lists, your --flags come after its flags:
#   mujoco       CrossQ's figure 5, with all its algorithms and MuJoCo tasks; 10 seeds of 1M steps
#   rivals       CrossQ (256 wide), SAC, TD3, REDQ and DroQ on two of them; 2 seeds of 30 000 steps
#   dmc          figure 3 of CrossQ + WN: 15 tasks of DeepMind Control; 10 seeds of 1M steps
#   myosuite     the same on its 10 MyoSuite tasks
#   utd-scaling  CrossQ + WN at UTD 1, 2 and 5, with and without weight normalisation; as dmc
#   ablations    those of CrossQ's paper, on its MuJoCo tasks; 5 seeds of 1M steps
#   quick        all four scripts, 256 wide, on two cheap tasks; 3 seeds of 5000 steps, then plots
# dmc, utd-scaling and myosuite add each algorithm's own flags for the suite: see README.md.
#
#   --scripts "A B"            of the top level or of benchmark/algorithms
#   --setting "A --flag ..."   one more script, with flags of its own; may be repeated.
#                              "ablate A --flag ..." runs A through benchmark/ablate.py
#   --envs "E F"   --seeds "1 2" (default: 1)   --steps N (default: 1000000 environment steps)
#   --flags "..."              more flags for every run; where a flag comes twice, the last counts
#   --out DIR                  a run is DIR/runs/ENV__SCRIPT+FLAGS__SEED, its output is beside it
#   --workers N                runs at a time (default: one per GPU, or per CPU; Slurm: no limit)
#   --slurm "..."              submit one array, a run per task, with these options for sbatch
#   --dry-run                  print the commands of the unfinished runs, and start nothing
#
# PYTHON=... names the interpreter. Exit codes: 0 if all runs have finished or are submitted, 1 if
# one has not finished, 2 after a wrong argument, 130 after a signal.

set -euo pipefail -f # -f: lists are split into words, but never globbed
self=$(realpath "${BASH_SOURCE[0]}") arguments=("$@") root=${self%/*/*}
suite='' settings=() own=() envs='' seeds="1 2 3 4 5 6 7 8 9 10" steps=1000000 flags=''
out=. workers='' slurm=no dry_run='' task='' # --task I: run number I alone

die() {
  echo "run.sh: error: $*" >&2
  exit 2
}

# ------------------------------ the grid

mujoco="Hopper-v4 Walker2d-v4 Ant-v4 HalfCheetah-v4 Humanoid-v4 HumanoidStandup-v4"
dmc=$(printf 'shimmy:dm_control/%s-v0 ' dog-{stand,walk,trot,run} humanoid-{stand,walk,run} \
  {cheetah,walker,quadruped}-run hopper-{stand,hop} finger-turn_hard fish-swim pendulum-swingup)
rates="--action-repeat 2 --critic-lr 8e-4 --actor-lr 8e-4"
figure_3=("crossq_wn_highutd --utd "{1,2,5} crossq_sac sac_baseline bro "bro --fast" sr_sac)
preset=${1-}
[[ $# = 0 || $preset = -* ]] || shift
case $preset in
  -* | '') seeds=1 ;;
  mujoco)
    settings=(crossq_sac crossq_td3 sac_baseline redq droq td3)
    envs=$mujoco ;;
  rivals)
    settings=("crossq_sac --critic-width 256" sac_baseline td3 redq droq)
    envs="HalfCheetah-v4 Hopper-v4" seeds="1 2" steps=30000 flags="--eval-every 5000" ;;
  dmc)
    settings=("${figure_3[@]}")
    envs=$dmc suite=dmc flags="--eval-every 25000" ;;
  myosuite)
    settings=("${figure_3[@]}")
    envs=$(echo myosuite:myoHand{Reach,Pose,ObjHold,KeyTurn,PenTwirl}{Fixed,Random}-v0)
    suite=myosuite flags="--eval-every 25000" ;;
  utd-scaling)
    settings=("crossq_wn_highutd --utd "{1,2,5}
      "ablate crossq_wn_highutd --weight-norm none --utd "{1,2,5})
    envs=$dmc suite=dmc flags="--eval-every 25000" ;;
  ablations)
    settings=(
      crossq_sac{," --critic-width 256"," --adam-beta1 0.9"," --policy-delay 1"," --n-critics 1"}
      "ablate crossq_sac --"{"bn-momentum 0.9","actor-norm none",bootstrap-at-termination}
      "ablate crossq_sac --critic-norm "{bn,ln,none} # figures 9, 10 and 13
      sac_baseline{," --critic-width 2048"," --utd 20 --policy-delay 20"}
      {redq,droq}{," --critic-width 2048"}{," --adam-beta1 0.5"} # figures 14 and 15
      "ablate sac_baseline --critic-norm brn --target-stats "{own,live} # figures 9 and 13
      "ablate sac_baseline --tau 1 --activation "{relu,tanh,relu6,sin,elu,glu} # figure 16
      "ablate sac_baseline --tau 1 --activation "{relu-over-max,layernormed-relu}
    )
    envs=$mujoco seeds="1 2 3 4 5" ;;
  quick)
    settings=(crossq_sac crossq_td3 sac_baseline
      "crossq_wn_highutd --utd 2 --critic-lr 3e-4 --actor-lr 3e-4 --entropy-factor 0.5")
    envs="InvertedPendulum-v4 HalfCheetah-v4" seeds="1 2 3" steps=5000
    flags="--critic-width 256 --learning-starts 1000 --eval-every 1000 --eval-episodes 3"
    flags+=" --no-compile" ;;
  *) die "there is no preset $preset; see --help" ;;
esac

while (($#)); do
  taken=2
  case $1 in
    --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$self" && exit ;;
    --dry-run) dry_run=1 taken=1 ;;
    --scripts) for script in ${2-}; do own+=("$script"); done ;;
    --setting) own+=("${2-}") ;;
    --flags) flags+=" ${2-}" ;;
    --envs | --seeds | --steps | --out | --workers | --slurm | --task)
      printf -v "${1#--}" %s "${2-}" ;;
    *) die "unknown argument $1; see --help" ;;
  esac
  shift $taken || die "$1 needs a value"
done
[[ -z ${own[*]-} ]] || settings=("${own[@]}")
[[ -n ${settings[*]-} && -n $envs ]] || die "nothing to run: give a preset, or --scripts and --envs"
[[ $steps,${workers:-1} =~ ^[1-9][0-9]*,[1-9][0-9]*$ ]] ||
  die "--steps and --workers are positive integers"

python=${PYTHON:-python}
[[ $python != */* ]] || python=$(realpath -s "$python") # the runs have another current directory
out=$(realpath -m "$out")
runs=$out/runs
programs=() labels=()
for setting in "${settings[@]}"; do
  script=${setting#ablate } && script=${script%% *}
  file=$root/$script.py
  [[ -e $file ]] || file=$root/benchmark/algorithms/$script.py
  [[ -e $file ]] || die "there is no script $script.py"
  case $suite:$script in # CrossQ, appendix A.1; CrossQ + WN, table 1
    :* | *:bro) added='' ;; # bro has one setting everywhere
    myosuite:*) added="--action-repeat 2 --gamma 0.95" ;;
    dmc:xqc) added="--action-repeat 2 --gamma 0.99" ;;
    dmc:redq | dmc:droq) added="$rates --alpha-lr 8e-4" ;;
    dmc:crossq_td3) added="$rates --policy-delay 1" ;;
    dmc:crossq_sac | dmc:sac_baseline) added="$rates --policy-delay 1 --alpha-lr 8e-4" ;;
    dmc:*) added="--action-repeat 2" ;;
  esac
  program=$(printf '%q ' "$python")
  [[ $setting != ablate\ * ]] || program+=$(printf '%q ' "$root/benchmark/ablate.py")
  programs+=("$program$(printf %q "$file") $added ${setting#*"$script"} $flags")
  # Flags that change no result are not in a name, nor are the suite's.
  no_result=' --(device|eval-[a-z]+|checkpoint-minutes)[ =]+[^ ]+| --(no-)?(compile|track)'
  labels+=("$(sed -E "s/$no_result//g; s/^ablate /ablate_/; s/ *$//; s/ +--/+/g; s/ +/=/g" \
    <<<"$setting $flags")")
done
names=() commands=()
for seed in $seeds; do # outermost: one seed of everything comes first
  for env in $envs; do
    for i in "${!settings[@]}"; do
      name=${env}__${labels[i]}__$seed
      names+=("${name//[^A-Za-z0-9._+=-]/_}")
      commands+=("${programs[i]} --env-id $env --seed $seed --total-timesteps $steps")
    done
  done
done

finished() { # NAME: after so many steps at least
  [[ -e $runs/$1/finished ]] && read -r reached <"$runs/$1/finished" && ((reached >= steps))
}

command_of() { # INDEX
  local how="--run-name ${names[$1]}"
  [[ ! -e $runs/${names[$1]}/checkpoint.pt ]] || how="--resume runs/${names[$1]}"
  echo "${commands[$1]} $how"
}

# ------------------------------ one run

export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD # for environments in the current directory
# glibc keeps freed memory: on a CPU, clearing fresh pages slows the updates of wide critics.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647
if [[ -n $task ]]; then
  name=${names[task]}
  read -ra gpus <<<"${RUN_SH_GPUS-}"
  [[ -z ${gpus[*]-} ]] || export CUDA_VISIBLE_DEVICES=${gpus[RUN_SH_SLOT % ${#gpus[@]}]}
  # The run holds this lock too, so it is not started twice even if only this shell is killed.
  exec 9>>"$runs/$name.log"
  flock -w 5 9 || die "$name is being run by another process"
  if finished "$name"; then exit; fi
  # A run killed in its first second left nothing to resume, and a script refuses a used folder.
  [[ -e $runs/$name/checkpoint.pt || -e $runs/$name/evaluations.csv ]] || rm -rf "${runs:?}/$name"
  cd "$out"
  command=$(command_of "$task")
  echo "start    $name"
  printf '\n== %s\n' "$command" >&9 # the progress bar of a killed run has left its line open
  eval "$command" </dev/null >&9 2>&1 || die "$name failed: $runs/$name.log"
  echo "$steps" >"$runs/$name/finished"
  echo "finished $name"
  exit
fi

# ------------------------------ all runs

todo=() failed=()
for i in "${!names[@]}"; do finished "${names[i]}" || todo+=("$i"); done
echo "# $((${#names[@]} - ${#todo[@]})) of ${#names[@]} runs in $runs have finished"
((${#todo[@]})) || exit 0
[[ -n $dry_run ]] || mkdir -p "$runs"
if [[ -n $dry_run ]]; then
  for i in "${todo[@]}"; do command_of "$i"; done
elif [[ $slurm != no ]]; then # one array, whose indices are those of the unfinished runs
  largest=$(scontrol show config | sed -n 's/^MaxArraySize *= //p')
  ((todo[-1] < largest)) || die "Slurm's MaxArraySize is $largest: submit fewer runs, see --seeds"
  array=$(IFS=, && echo "${todo[*]}")${workers:+%$workers}
  # shellcheck disable=SC2086 # a list of words
  sbatch --requeue --open-mode=append --output="$runs/slurm-%A_%a.log" --array="$array" $slurm \
    --wrap "export OMP_NUM_THREADS=\${OMP_NUM_THREADS:-\${SLURM_CPUS_PER_TASK:-1}}
      exec bash $(printf '%q ' "$self" "${arguments[@]}")--task \$SLURM_ARRAY_TASK_ID"
else
  gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>&1 | grep -oP '^GPU \K\d+' || true)}
  export RUN_SH_GPUS=${gpus//[$',\n']/ }
  workers=${workers:-$(wc -w <<<"$RUN_SH_GPUS")}
  ((workers)) || workers=$(env -u OMP_NUM_THREADS nproc) # with it nproc counts threads
  ((workers == 1)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  set -m # the pool is then a process group, which one signal ends
  trap 'kill %1; wait; echo "stopped: the same call goes on"; exit 130' HUP INT TERM
  xargs -n 1 -P "$workers" --process-slot-var=RUN_SH_SLOT bash "$self" "${arguments[@]}" --task \
    <<<"${todo[*]}" &
  wait $! || true
  for i in "${todo[@]}"; do finished "${names[i]}" || failed+=("$runs/${names[i]}.log"); done
  if ((${#failed[@]})); then
    printf 'not finished: %s\n' "${failed[@]}"
    exit 1
  fi
  [[ $preset != quick ]] || "$python" "$root/benchmark/plot.py" --runs "$runs" --out "$runs"
fi
