#!/bin/bash
# configs/launch/ssh.sh "node1 node2 node3 node4" 1:4 configs/train/imagenet-lorot_e.yaml [KEY=VALUE]...
#
# Starts the rendezvous here and one `lorot train` on each machine by ssh, in this folder, which all of them share (as
# does `output`). Ctrl-C, or SIGTERM, ends all of them after a checkpoint; the same line then goes on from there. A
# machine that was lost and is back: run this with its name alone and MEET=HOST:PORT as the first line here told it.

set -u
hosts=$1 nnodes=$2
shift 2
rendezvous=
if [ -z "${MEET:-}" ]; then
  MEET=$(hostname -f):${PORT:-29400}
  lorot rendezvous --host "${MEET%:*}" --port "${MEET#*:}" &
  rendezvous=$!
fi

mkdir -p .launch
line=$(printf ' %q' "$@" --nnodes "$nnodes" --rdzv "$MEET")
named() {
  # Ctrl-C is no reason to lose the last words.
  trap '' INT
  sed "s/^/$1: /"
}
jobs=()
for host in $hosts; do
  pid=.launch/$host.pid
  ssh -n "$host" "cd $(printf '%q' "$PWD") && echo \$\$ > $pid && exec lorot train$line" > >(named "$host") 2>&1 &
  jobs+=($!)
done

stop() {
  for host in $hosts; do
    ssh -n "$host" "kill -TERM $(cat ".launch/$host.pid")"
  done
}
trap stop INT TERM
code=0
for job in "${jobs[@]}"; do
  # A signal interrupts the waiting, not the job.
  while kill -0 "$job" 2>/dev/null; do
    wait "$job"
  done
  wait "$job"
  ended=$?
  [ "$ended" -eq 0 ] || code=$ended
done
[ -z "$rendezvous" ] || kill "$rendezvous"
exit "$code"
