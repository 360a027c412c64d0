# shellcheck shell=bash
# suite.bash is sourced by kernel and tools: packages of a Debian suite, which are unpacked and not installed. The caller has
# a directory $work.

options=(-o APT::Sandbox::User=)

# suite_options SUITE makes apt look at that suite, in a state of its own: the machine's is left alone, and what is installed
# there is no candidate.
# shellcheck disable=SC2154 # The caller has work.
suite_options() {
	local mirror
	# shellcheck disable=SC2016 # apt expands it.
	mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' | head -n 1)
	mkdir -p "$work/lists/partial" "$work/archives/partial"
	: >"$work/status"
	printf '%s\n' "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${mirror:?no Debian mirror among the sources of apt} $1 main" >"$work/sources.list"
	options+=(
		-o "Dir::State::Lists=$work/lists" -o "Dir::State::Status=$work/status" -o "Dir::Cache=$work" -o "Dir::Cache::Archives=$work/archives"
		-o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
		-o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
	)
	apt-get -q "${options[@]}" update
}

# unpack PACKAGE unpacks it below $work/root.
unpack() {
	(cd "$work" && apt-get -q "${options[@]}" download "$1")
	dpkg-deb -x "$work/$1"_*.deb "$work/root"
}

# sources PACKAGE unpacks what its maintainers took from elsewhere, without their changes, as $work/source; with the paths
# that follow, those alone.
sources() {
	local package=$1 uri name hash
	shift
	sed -i 's/^deb /deb-src /' "$work/sources.list"
	apt-get -q "${options[@]}" update
	read -r uri name _ hash < <(apt-get -q "${options[@]}" --print-uris --download-only source "$package" | grep -E '\.orig\.tar\.[a-z0-9]+ ')
	/usr/lib/apt/apt-helper "${options[@]}" download-file "${uri//\'/}" "$work/$name" "$hash"
	mkdir -p "$work/source"
	tar -xf "$work/$name" -C "$work/source" --strip-components 1 --wildcards "$@"
}
