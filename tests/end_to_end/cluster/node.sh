# Process 1 of a node: a host name, an address, /dev/shm, /run, accounts and keys of its own; the disk is everybody's.
# It stays when everything else on the node is killed, so that the node can be started again.
# bash node.sh NUMBER FOLDER
set -euo pipefail
number=$1 folder=$2
hostname "node$number"
ip link set lo up
ip address add "10.77.0.$number/24" dev eth0
ip link set eth0 up
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir --mode=755 /run/sshd
mkdir --mode=1777 /run/tmp # process ids repeat between nodes, so do names of temporary files made of them
for path in "$folder"/etc/*; do
    mount --bind "$path" "/etc/${path##*/}"
done
mkfifo /run/nothing
exec 3<>/run/nothing
/usr/sbin/sshd -E "$folder/node$number.log"
while :; do read -r -u 3 || true; done # meanwhile bash collects the orphans that end
