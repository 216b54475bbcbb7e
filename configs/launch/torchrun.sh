#!/bin/bash
# configs/launch/torchrun.sh 1:4 login1:29400 8 RUN_ID configs/train/imagenet-lorot_e.yaml [KEY=VALUE]...
#
# On each machine: plain torchrun with the settings that `lorot train --nnodes` uses, for launchers that want torchrun.
# RUN_ID: the job's name at the rendezvous, as --run-id of `lorot train`, which takes the run's name= without one. All
# machines of a job give the same, and no other job there. After a stop by a signal the same lines go on, and
# a machine that died is taken back by its line while others train. Once torchrun has ended by itself, RUN_ID is closed
# there, and the next start of the run takes another one (RUN_ID-1, ...).
# What is missing: early checks, the exit codes (torchrun's is always 1; error.json in the run folder has the job's)
# and the account of restarts: each machine restarts its workers 100 times at
# most, whatever ended them, and the coming or going of another machine counts too.
# The rendezvous is `lorot rendezvous --port 29400` on a machine that outlives the others. ADDRESS: of this machine for
# the others, where its full name does not lead to it; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME: the network to use.

set -eu
nnodes=$1 meeting=$2 workers=$3 run_id=$4 config=$5
shift 5
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 LOROT_RENDEZVOUS=$meeting
meet=is_host=0,last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=2,join_timeout=600,read_timeout=30
exec torchrun \
  --nnodes "$nnodes" --nproc-per-node "$workers" --max-restarts 100 --shutdown-timeout 23 \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --rdzv-backend c10d --rdzv-endpoint "$meeting" --rdzv-id "$run_id" \
  --rdzv-conf "$meet" \
  --local-addr "${ADDRESS:-$(hostname -f)}" \
  -m service.training.worker "$config" "$@" --resume
