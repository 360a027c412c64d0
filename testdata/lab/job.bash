# shellcheck shell=bash
# job.bash is sourced by the runners uml and qemu: what both do before and after their kernel runs.
#
# A job is one command inside one kernel. Its directory on the host holds everything that goes in (start, binds, disk)
# and everything that comes out (began, exit, console), and is removed with the job. A runner sets $lab, its own directory,
# and has a function not_begun for a machine that did not get as far as the init inside.

usage() {
	cat >&2 <<-TEXT
		usage: ${0##*/} [options] [--] CMD [ARG...]
		  --disk SIZE     scratch ext4 file system on /mnt/disk (default 4G, sparse; 0: none)
		  --mem SIZE      memory of the machine (default 1G)
		  --timeout S     seconds until the machine is killed and the exit code is 124 (default 300; 0: never)
		  --out DIR       directory of the host that is writable inside, as /mnt/out
		  --no-nbd        leave the nbd module where it is, unloaded
		  --check         fail when a device is still connected or the kernel complained of itself at the end
		  --shell         an interactive shell instead of a command
	TEXT
	usage_more >&2
	exit 2
}

# parse reads the options that the runners share. Those it does not know go to parse_more, a runner's own.
# shellcheck disable=SC2034 # The runners read mem, out and nbd.
parse() {
	disk=4G mem=1G timeout=300 out='' nbd=1 check='' shell=''
	while [[ $# -gt 0 ]]; do
		case $1 in
		--disk) disk=${2?} && shift ;;
		--mem) mem=${2?} && shift ;;
		--timeout) timeout=${2?} && shift ;;
		--out) out=$(realpath -e -- "${2?}") && shift ;;
		--no-nbd) nbd='' ;;
		--check) check=1 ;;
		--shell) shell=1 ;;
		--) shift && break ;;
		-*) parse_more "$@" || usage && shift ;;
		*) break ;;
		esac
		shift
	done
	command=("$@")
	[[ $shell ]] && command=(/bin/bash --norc)
	[[ ${#command[@]} -gt 0 ]] || usage
}

# make_job lays out the job directory, below the cache and not below /tmp, which is another one inside.
make_job() {
	cache=${XDG_CACHE_HOME:-$HOME/.cache}/nbdctl-lab
	mkdir -p "$cache"
	cache=$(realpath "$cache")
	exec 9>"$cache/jobs.lock" && flock 9
	sweep "$cache"
	job=$(mktemp -d "$cache/job.XXXXXX")
	trap end_job EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	exec 8>"$job/lock" && flock 8
	exec 9>&-

	# Tmpfs covers these directories inside; what the job needs from below them stays visible.
	# shellcheck disable=SC2154
	printf '%s\n' "$(realpath "$lab/../..")" "$cache" "$(pwd -P)" |
		{ grep -E '^/(tmp|run|mnt|var/tmp)/' || true; } | sort -u >"$job/binds"
	start >"$job/start"
	if [[ $disk != 0 ]]; then
		truncate -s "$disk" "$job/disk"
		PATH=$PATH:/usr/sbin:/sbin mkfs.ext4 -q -F -E nodiscard "$job/disk"
	fi
}

# sweep removes what runners left that were killed outright. A job whose machine still runs holds its lock.
sweep() {
	local lock
	for lock in "$1"/job.*/lock; do
		[[ ! -e $lock ]] || flock -n "$lock" rm -rf "${lock%/lock}" || true
	done
}

# start prints the script that the init inside runs: the caller's environment and directory, then the command.
start() {
	local name
	for name in $(compgen -e); do
		case $name in
		PATH | TERM | LANG | LC_* | TZ | CI | CGO_* | GO[A-Z0-9]* | NBD*)
			printf 'export %s=%q\n' "$name" "${!name}"
			;;
		esac
	done
	# With another HOME, what go keeps below it has to be named.
	if command -v go >/dev/null; then
		printf 'export GOMODCACHE=%q GOFLAGS=%q GOPROXY=off\n' "$(go env GOMODCACHE)" "$(go env GOFLAGS)"
	fi
	printf 'unset mem uml_dir NBD_LAB_{INIT,JOB,LOAD,MODULES,OUT,SHELL}\n'
	printf 'export NBD_LAB NBD_LAB_DISK=/mnt/disk NBD_TEST_REQUIRE=1 HOME=/tmp/home\n'
	printf 'cd -- %q || exit 1\n' "$(pwd -P)"
	printf '%q ' "${command[@]}"
	printf '\n'
	if [[ $check ]]; then
		# shellcheck disable=SC2016 # The code is the command's, inside.
		printf 'code=$?; %q || exit $((code ? code : 1)); exit $code\n' "$lab/check"
	fi
}

# run_job runs the machine, given as a command line that writes the command's output to descriptor 3. It leaves with the
# exit code of the command; 124 after a timeout; 125 when the machine died of itself; as not_begun does when it did not
# even start.
run_job() {
	local began=$SECONDS code=0 output terminal
	if [[ $shell ]]; then
		terminal=$(stty -g) || exit 2
		stty raw -echo
		"$@" 3>&1 >"$job/console" 2>&1 || code=$?
		stty "$terminal"
	else
		exec 3> >(exec cat 8>&-)
		output=$!
		# Without a parent the machine goes too, even if that was killed outright.
		# shellcheck disable=SC2016
		setpriv --pdeathsig TERM timeout -k 2 "$timeout" \
			setpriv --pdeathsig KILL setsid bash -c 'echo $$ >"$0" && exec "$@"' "$job/group" "$@" \
			</dev/null >"$job/console" 2>&1 &
		timeout_pid=$!
		exec 3>&-
		wait "$timeout_pid" 2>/dev/null || code=$?
		stop_machine
		wait "$output" || true
	fi

	[[ -s $job/exit ]] && exit "$(<"$job/exit")"
	if ((timeout > 0 && SECONDS - began >= timeout)); then
		cat "$job/console" >&2
		echo "${0##*/}: killed after $timeout s" >&2
		exit 124
	fi
	[[ -e $job/began ]] || not_begun
	cat "$job/console" >&2
	echo "${0##*/}: the machine ended without an exit code (its own: $code)" >&2
	exit 125
}

# stop_machine ends what is left of the machine's process group: the helpers of User-Mode Linux survive its own death
# when that was sudden, and hold the output open.
stop_machine() {
	if kill -TERM "$timeout_pid" 2>/dev/null; then
		wait "$timeout_pid" || true
	fi
	kill -KILL -- "-$(<"$job/group")" 2>/dev/null || true
	timeout_pid=''
}

end_job() {
	[[ ${timeout_pid-} ]] && stop_machine
	rm -rf "$job"
}
