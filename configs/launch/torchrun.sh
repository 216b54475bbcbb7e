#!/bin/bash
# configs/launch/torchrun.sh 1:4 login1:29400 8 configs/train/imagenet-lorot_e.yaml [KEY=VALUE]...
#
# On each machine: plain torchrun with the settings that `lorot train --nnodes` uses, for launchers that want torchrun.
# What is missing: early checks, the exit codes (torchrun's is always 1; error.json in the run folder has the job's) and
# the account of restarts, so that every lost machine costs one of --max-restarts.
# The rendezvous is `lorot rendezvous --port 29400` on a machine that outlives the others. ADDRESS: of this machine for
# the others, where its full name does not lead to it; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME: the network to use.

set -eu
nnodes=$1 meeting=$2 workers=$3 config=$4
shift 4
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
  --nnodes "$nnodes" --nproc-per-node "$workers" --max-restarts 100 --shutdown-timeout 23 \
  --rdzv-backend c10d --rdzv-endpoint "$meeting" --rdzv-id "$(basename "$config" .yaml)" \
  --rdzv-conf is_host=0,last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=2,join_timeout=600 \
  --local-addr "${ADDRESS:-$(hostname -f)}" \
  -m service.training.worker "$config" "$@" --resume
