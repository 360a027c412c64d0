# job.bash is sourced by the runners uml and qemu: what both do before and after their kernel runs.
#
# A job is one command inside one kernel. Its directory on the host holds everything that goes in (start,
# binds, disk) and everything that comes out (exit, console), and is removed with the job.

usage() {
	cat >&2 <<-TEXT
		usage: ${0##*/} [options] [--] CMD [ARG...]
		  --disk SIZE     scratch ext4 file system on /mnt/disk (default 4G, sparse; 0: none)
		  --mem SIZE      memory of the machine (default 1G)
		  --timeout S     seconds until the machine is killed and the exit code is 124 (default 300; 0: never)
		  --out DIR       directory of the host that is writable inside, as /mnt/out
		  --no-nbd        leave the nbd module where it is, unloaded
		  --check         fail when a device is still connected or the kernel complained at the end
		  --shell         an interactive shell instead of a command
	TEXT
	printf '  %s\n' "${usage_more[@]}" >&2
	exit 2
}

# parse reads the options that all runners share. Those it does not know go to parse_more, a runner's own.
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
	[[ $shell ]] && timeout=0 command=(/bin/bash --norc)
	[[ ${#command[@]} -gt 0 ]] || usage
}

# make_job lays out the job directory, below the cache and not below /tmp, which is another one inside.
make_job() {
	cache=${XDG_CACHE_HOME:-$HOME/.cache}/nbdctl-lab
	mkdir -p "$cache"
	job=$(mktemp -d "$cache/job.XXXXXX")
	trap 'rm -rf "$job"' EXIT
	trap 'exit 130' INT TERM HUP

	# Tmpfs covers these directories inside; what lies below them on the host and is needed stays visible.
	printf '%s\n' "$(realpath "$lab/../..")" "$(realpath "$cache")" "$(pwd -P)" |
		{ grep -E '^/(tmp|run|mnt|var/tmp)/' || true; } | sort -u >"$job/binds"
	start >"$job/start"
	if [[ $disk != 0 ]]; then
		truncate -s "$disk" "$job/disk"
		PATH=$PATH:/usr/sbin:/sbin mkfs.ext4 -q -F -E nodiscard "$job/disk"
	fi
}

# start prints the script that the init inside executes: the caller's environment and directory, then the command.
start() {
	local name
	for name in $(compgen -e); do
		case $name in
		PATH | TERM | LANG | LC_* | TZ | CI | CGO_* | GO[A-Z0-9]* | NBD*)
			printf 'export %s=%q\n' "$name" "${!name}"
			;;
		esac
	done
	# Without a HOME that is theirs, go's own directories would move with it.
	if command -v go >/dev/null; then
		printf 'export GOMODCACHE=%q GOFLAGS=%q GOPROXY=off\n' "$(go env GOMODCACHE)" "$(go env GOFLAGS)"
	fi
	printf 'unset mem uml_dir NBD_LAB_{INIT,JOB,LOAD,MODULES,OUT,SHELL}\n'
	printf 'export NBD_LAB NBD_LAB_DISK=/mnt/disk NBD_TEST_REQUIRE=1 HOME=/tmp/home\n'
	printf 'cd -- %q || exit 1\n' "$(pwd -P)"
	printf '%q ' "${command[@]}"
	printf '\n'
	[[ $check ]] && printf 'code=$?; %q && exit $code; ((code)) && exit $code; exit 1\n' "$lab/check"
	return 0
}

# run_job runs the machine given as a command line, in a process group and session of its own, with the command's output
# on descriptor 3. It leaves with the exit code of the command, 124 after a timeout, 125 when the machine died.
run_job() {
	local pid cat code=0
	if [[ $shell ]]; then
		local tty
		tty=$(stty -g) || { echo "${0##*/}: --shell needs a terminal" >&2 && exit 2; }
		stty raw -echo
		"$@" 3>&1 >"$job/console" 2>&1 || code=$?
		stty "$tty"
	else
		exec 3> >(exec cat)
		cat=$!
		timeout -k 2 "$timeout" "$@" </dev/null >"$job/console" 2>&1 &
		pid=$!
		exec 3>&-
		# Whoever stops the runner stops the machine: timeout passes the signal on to its whole process group.
		trap 'kill -TERM "$pid" 2>/dev/null; wait "$pid"; rm -rf "$job"' EXIT
		wait "$pid" 2>/dev/null || code=$?
		trap 'rm -rf "$job"' EXIT
		wait "$cat" || true
	fi

	[[ -s $job/exit ]] && exit "$(cat "$job/exit")"
	cat "$job/console" >&2
	if [[ $code == 124 || $code == 137 ]]; then
		echo "${0##*/}: killed after ${timeout} s" >&2
		exit 124
	fi
	echo "${0##*/}: the machine ended without an exit code (its own: $code)" >&2
	exit 125
}
