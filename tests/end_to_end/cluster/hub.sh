# Process 1 of a cluster: the switch that its nodes are plugged into. Its end, which an end of file on stdin brings
# about however the program that holds the other side has ended, ends every process of every node.
# Started by __init__.py in namespaces of its own: bash hub.sh NODES FOLDER
set -euo pipefail
[ $$ = 1 ] || { echo "error: hub.sh ends every process that it sees; it is only for a namespace of its own" >&2; exit 2; }
nodes=$1 folder=$2 here=$(dirname "$0")
trap 'kill -KILL -1 || true; rm -rf "$folder"' EXIT

ip link set lo up
ip link add name switch type bridge
ip address add 10.77.0.254/24 dev switch
ip link set switch up
for number in $(seq "$nodes"); do
    # The cable is laid from the node's side: here process 1 is still this one. exec: no process in between.
    unshare --net bash -c '
        ip link add name eth0 type veth peer name "port$2" netns 1
        exec unshare --uts --ipc --pid --mount --fork --kill-child --mount-proc bash "$1" "$2" "$3"
    ' - "$here/node.sh" "$number" "$folder" </dev/null >&2 &
done
for number in $(seq "$nodes"); do
    until ip link set "port$number" master switch up 2>/dev/null; do sleep 0.02; done
done
for number in $(seq "$nodes"); do
    until (: <"/dev/tcp/10.77.0.$number/22") 2>/dev/null; do sleep 0.05; done
done
echo ready
read -r || true
