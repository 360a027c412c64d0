# Everything builds with go alone. The rest needs a Debian machine: make test and make demo install what they use (as
# root) and bring their own Linux kernel with nbd, in User-Mode Linux or QEMU.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PREFIX ?= /usr/local
LAB ?= uml
# The kernel tests: of which name, and in which packages (all that have some).
RUN ?= ^TestKernel
PKG ?=
COUNT ?=
# Those that make test repeats with several processors and -race, in a machine that takes several times longer.
RACE_RUN ?= ^TestKernel(Multi|Scenarios|Example|Durability|Data$$|Reconnected|ResizeUnderLoad|Trap(14|26))
# Those that make matrix has in such machines besides.
RACE_MORE ?= ^TestKernel(Features|SideBySide|Flush(Stack|Btrfs)|Swap|Ioctl(Session|Terminated|Killed|Signals|Ends|FreeDevice)|HandOver|Handover)$$
# Unit tests of bytes that other machines read.
BYTES_RUN ?= ^Test(ByteOrder|Encode|Decode|Numbers|Ioctl|Handshake|Transmit|SimpleReply|Chunk|Greeting|Option|Info)
# How many devices make soak makes; make test makes 200.
ROUNDS ?= 2000
# How often make survive kills a server and cuts the network; make test does 3 and none.
RESTARTS ?= 100
CUTS ?= 20
# How often make survive cuts off the power, on each file system below; make test does 5 times.
POWER_CUTS ?= 50
# The kernels of make matrix: those of Debian suites (5.10, 6.1, 6.12, 7.x), and with several processors and -race the
# machine's own and the newest that there is.
KERNELS ?= bullseye bookworm trixie sid race race:trixie-backports
# Where make interop has its clients from.
SUITE ?= trixie
# The tests of reconnection, which make test repeats on 6.12, where the receiver of an old connection ends late.
RECONNECT_RUN ?= ^TestKernel(Reconfigure|Reconnect|Trap09)
# The revision whose nbdctl make test-compat tries beside this tree's.
BASE ?= 951cde1
FUZZTIME ?= 10s
# BENCH=quick: short rounds, to see that it works. The cases: of which name (memory/rr4k-q32, file/, kernel/, growth/, idle; tuning/ is
# measured only when it is named).
BENCH ?= full
CASES ?=

# What nbdctl version says: go build records the commit where git can tell it, whatever GOFLAGS has, and else does without.
buildvcs = -buildvcs=$(if $(shell git log -1 --format=%H 2>/dev/null),auto,false)

# Without the generator of manual pages nbdctl starts in four fifths of the time. What is in GOFLAGS has precedence.
tags = $(if $(findstring -tags,$(shell go env GOFLAGS)),,-tags urfave_cli_no_docs)

lab := testdata/lab
stage := $(lab)/stage
# Unless one is asked for, QEMU takes the place of a User-Mode Linux that cannot start.
machine = $(lab)/$(LAB)$(if $(filter file,$(origin LAB)), --or-qemu)
# Kernel tests are under QEMU unless something else is asked for: what takes long there is to start.
machines = $(if $(filter file,$(origin LAB)),qemu,$(LAB))

.PHONY: help build install test test-unit test-kernel test-reconnect test-race test-lab test-compat interop matrix soak survive bench-handover compare-crash flaky lab demo bench bench-connect \
	bench-many lint fuzz clean needs needs-demo

help:
	@sed -n 's/^## //p' Makefile

## make build        .bin/nbdctl
build:
	CGO_ENABLED=0 go build -trimpath $(tags) $(buildvcs) -o .bin/nbdctl ./cmd/nbdctl

## make install      to PREFIX/bin (/usr/local/bin)
install: build
	install -D -m 755 .bin/nbdctl "$(DESTDIR)$(PREFIX)/bin/nbdctl"

## make test         all tests: unit tests here, kernel tests under QEMU, some of them with several processors and -race
test: needs
	@$(stage) total $(MAKE) --no-print-directory test-lab test-unit test-kernel test-reconnect test-race

## make test-lab     tests of the lab itself: hosts with more registers, without ptrace, with noexec: KERNELS='bullseye trixie'
test-lab: needs
	@$(stage) 'tests of the lab' $(lab)/selftest $(if $(filter file,$(origin KERNELS)),,$(KERNELS))

## make test-unit    unit tests, with -race; then those that the race detector does not let run, on the fast build
test-unit: packages = $$((2 * $$(nproc))) # at a time: some tests wait more than they compute
test-unit: needs
	@$(stage) 'unit tests' bash -c "set -o pipefail; \
		NBD_TEST_REQUIRE=1 go test -p $(packages) -race -v -skip '^TestKernel' ./... ./testdata/backup 2>&1 | awk -v name='unit tests' -v quiet=1 -f $(lab)/tally"
	@$(stage) 'unit tests without -race' bash -c "set -o pipefail; \
		go test -p $(packages) -v -skip '^TestKernel' ./server ./server/internal/... ./backends/... 2>&1 | \
			awk -v name='unit tests without -race' -v quiet=1 -f $(lab)/tally"
	@# Those of the control interface and the wire protocol, on processors of the other byte order and of the other size:
	@# not on this one with 32 bits, which not every kernel lets run.
	@$(stage) 'unit tests, big-endian' bash -c "set -o pipefail; \
		GOARCH=s390x go test -v -exec qemu-s390x -run '$(BYTES_RUN)' ./nbdnl ./server ./server/wire 2>&1 | awk -v name='unit tests, big-endian' -v quiet=1 -f $(lab)/tally"
	@$(stage) 'unit tests, 32-bit' bash -c "set -o pipefail; \
		GOARCH=arm go test -v -exec qemu-arm -run '$(BYTES_RUN)' ./nbdnl ./server ./server/wire 2>&1 | awk -v name='unit tests, 32-bit' -v quiet=1 -f $(lab)/tally"
	@$(stage) 'unit tests of the benchmarks' go -C testdata/bench test ./...

## make test-kernel  kernel tests under QEMU, or with LAB=uml in User-Mode Linux: RUN=REGEXP PKG=./nbdnl
test-kernel: needs
	@$(stage) 'kernel tests' $(lab)/tests $(machines) '$(value RUN)' $(PKG)

## make test-reconnect   the kernel tests of reconnection on 6.12
test-reconnect: needs
	@$(stage) 'kernel tests of reconnection on 6.12' $(lab)/tests --kernel trixie $(machines) '$(RECONNECT_RUN)' $(PKG)

## make test-race    kernel tests with four processors and -race: RACE_RUN=REGEXP PKG=./nbdnl
test-race: needs
	@$(stage) 'kernel tests with -race' $(lab)/tests race '$(RACE_RUN)' $(PKG)

## make test-compat  nbdctl beside that of an older revision, each with devices of the other: BASE=REVISION of a clone with history
test-compat: needs
	@$(stage) 'compatibility with $(BASE)' $(lab)/compat '$(BASE)'

## make interop      clients of Debian 13 (libnbd 1.22, qemu 10), the tests of nbd-server, and those of QEMU's block layer, all
##                   fetched for it, against nbdctl serve: SUITE=sid
interop: needs build
	@$(lab)/needs interop
	@tools=$$($(lab)/tools '$(SUITE)' libnbd-bin python3-libnbd qemu-utils) && tester=$$($(lab)/tester '$(SUITE)') && \
		iotests=$$($(lab)/iotests) && PATH="$$tools:$$tester:$$PATH" NBD_TEST_IOTESTS="$$iotests" NBD_TEST_REQUIRE=1 \
			$(stage) 'interop with clients of $(SUITE)' go test -p 1 -v -tags interop,urfave_cli_no_docs -run '^TestInterop' ./cmd/nbdctl ./backends/nbd

## make matrix       kernel tests on 5.10, 6.1, 6.12, 7.x and, some more than test-race has, with -race, and a table of them, in
##                   50 minutes: KERNELS='bullseye sid race' LAB=uml RUN=REGEXP PKG=./nbdnl
matrix: needs
	@$(stage) 'kernel matrix' $(lab)/matrix $(machines) '$(KERNELS)' '$(value RUN)' \
		'$(if $(filter file,$(origin RUN)),$(RACE_RUN)|$(RACE_MORE),$(value RUN))' $(PKG)

## make soak         2,000 devices, made and ended while nbd-client and qemu-nbd do the same: ROUNDS=N
soak: needs
	@CGO_ENABLED=0 go test -c -o .bin/soak.test ./server/blockdev
	@NBD_TEST_SOAK_ROUNDS=$(ROUNDS) NBD_TEST_POOL_ROUNDS=20 $(stage) 'soak' $(lab)/$(machines) --mem 2G --check --timeout 3600 -- \
		.bin/soak.test -test.v -test.timeout 1h -test.run '^TestKernel(Soak|PoolMany)$$'

## make survive      a server that is killed, a network that is cut, and power that is cut off, under exports whose file systems are
##                   verified, and the first under nbd-client -persist: RESTARTS=N CUTS=N POWER_CUTS=N
survive: needs
	@CGO_ENABLED=0 go test -tags survive -c -o .bin/survive.test ./cmd/nbdctl
	@NBD_TEST_RESTARTS=$(RESTARTS) NBD_TEST_CUTS=$(CUTS) NBD_TEST_POWER_CUTS=$(POWER_CUTS) \
		$(stage) 'survive' $(lab)/$(machines) --mem 2G --timeout 3600 -- \
		.bin/survive.test -test.v -test.timeout 1h -test.run '^TestKernel(RemoteRestarts|RemoteCut|RemoteIdle|Persist|PowerCut)$$'

## make bench-handover   how long a device stands still when its process is upgraded, by the library and by nbdctl, and how soon it is
##                   served again when that is killed, under verified loads: UPGRADES=N KILLS=N CONNECTIONS=N LAB=uml
bench-handover: UPGRADES = 200
bench-handover: KILLS = 20
bench-handover: CONNECTIONS = 1
bench-handover: needs
	@CGO_ENABLED=0 go test -c -o .bin/handover.test ./testdata/handover
	@CGO_ENABLED=0 go test -tags survive -c -o .bin/upgrade.test ./cmd/nbdctl
	@NBD_TEST_UPGRADES=$(UPGRADES) NBD_TEST_KILLS=$(KILLS) \
		$(stage) 'handover' $(lab)/$(machines) --mem 1G --timeout 3600 -- \
		.bin/handover.test -test.v -test.timeout 1h
	@NBD_TEST_PAUSES=$$((($(UPGRADES) + 11) / 12)) NBD_TEST_CONNECTIONS=$(CONNECTIONS) \
		$(stage) 'upgrades by nbdctl' $(lab)/$(machines) --mem 1G --timeout 3600 -- \
		.bin/upgrade.test -test.v -test.timeout 1h -test.run '^TestKernelUpgradePauses$$'
	@NBD_TEST_KILLS=$$((($(KILLS) + 8) / 9)) \
		$(stage) 'restarts of nbdctl' $(lab)/$(machines) --mem 1G --timeout 3600 -- \
		.bin/upgrade.test -test.v -test.timeout 1h -test.run '^TestKernelRestartTimes$$'

## make compare-crash   what nbdctl, nbd-client with nbd-server, and qemu-nbd lose when a process is killed or replaced: a table
compare-crash: needs
	@$(lab)/needs bench
	@CGO_ENABLED=0 go test -tags survive -c -o .bin/crash.test ./cmd/nbdctl
	@$(stage) 'crashes compared' $(lab)/$(machines) --mem 1G --timeout 1800 -- \
		.bin/crash.test -test.v -test.timeout 30m -test.run '^TestKernelCompareCrash$$'

## make flaky        tests many times beside a load of twice the processors, to find those that fail by chance: unit tests 200 times
##                   with -race, kernel tests that wait for time or events 20 times on 6.1 and 6.12, in hours:
##                   KERNELS='unit trixie' RUN=REGEXP PKG=./nbdnl COUNT=N for some
flaky: needs
	@$(stage) 'tests beside load' $(lab)/flaky $(machines) '$(COUNT)' '$(if $(filter file,$(origin KERNELS)),unit bookworm trixie,$(KERNELS))' \
		'$(if $(filter file,$(origin RUN)),,$(value RUN))' $(PKG)

## make lab          a shell in a kernel with nbd: LAB=qemu; CMD='nbdctl list' runs that instead, and fails if it does
##                   (with make's own exit code, 2; testdata/lab/uml -- CMD returns the one of CMD)
lab: needs build
	@PATH="$(CURDIR)/.bin:$$PATH"; \
	if [[ -v CMD ]]; then exec $(machine) --timeout 0 -- bash -c "$$CMD"; else exec $(machine) --shell; fi

## make demo         the devices of nbdctl at work, on this machine's own kernel if it can and in the lab if not
demo: needs-demo build
	@PATH="$(CURDIR)/.bin:$$PATH"; \
	if $(lab)/native; then exec $(lab)/demo; else exec $(machine) --check --timeout 600 -- $(lab)/demo; fi

## make bench        nbdctl beside a floor in C and other servers, 20 minutes: BENCH=quick for 2, CASES=REGEXP for some;
##                   BASE=REV beside an earlier commit instead of the others, 15 rounds: the column nbdctl/it says what changed since
bench:
	@$(lab)/needs bench
	@CGO_ENABLED=0 go -C testdata/bench build -o ../../.bin/bench/bench .
ifneq ($(origin BASE),file)
	@base=$$(mktemp -d) && trap 'rm -rf "$$base"' EXIT && git archive '$(BASE)' | tar -x -C "$$base" && \
		.bin/bench/bench -base "$$base" $(if $(filter quick,$(BENCH)),-quick,-rounds 15) -cases '$(value CASES)'
else
	@.bin/bench/bench $(if $(filter quick,$(BENCH)),-quick) -cases '$(value CASES)'
endif

## make bench-connect how long devices take to come and go, beside the bare netlink command, nbd-client and qemu-nbd; and what
##                   idle ones cost: LAB=qemu, KERNEL=trixie, ROUNDS=N
bench-connect: ROUNDS = 20
bench-connect: needs
	@CGO_ENABLED=0 go -C testdata/bench build -o ../../.bin/connect ./connect
	@$(machine) --timeout 1800 --mem 2G $(if $(KERNEL),--kernel $(KERNEL)) -- .bin/connect -rounds $(ROUNDS)

## make bench-many   how long 200 devices take to end, in order and after a crash, beside 20,000 open files: DEVICES=N, FILES=N, LAB=qemu
bench-many: DEVICES = 200
bench-many: FILES = 20000
bench-many: needs
	@CGO_ENABLED=0 go test -c -o .bin/many.test ./server/blockdev
	@$(machine) --check --timeout 1800 --mem 2G -- env NBD_TEST_REQUIRE=1 NBD_TEST_MANY_DEVICES=$(DEVICES) NBD_TEST_MANY_FILES=$(FILES) \
		.bin/many.test -test.v -test.timeout 30m -test.run '^TestKernelManyEnd$$'

## make lint         gofmt, go vet, staticcheck, shellcheck, import rules, bounds
lint:
	@.ci/lint

## make fuzz         each fuzz target for FUZZTIME (10s)
fuzz:
	@.ci/fuzz $(FUZZTIME)

## make clean        removes .bin and what the lab has downloaded
clean:
	rm -rf .bin "$${XDG_CACHE_HOME:-$$HOME/.cache}/nbdctl-lab"

needs:
	@$(lab)/needs

needs-demo:
	@if $(lab)/native; then $(lab)/needs demo; else $(lab)/needs; fi
