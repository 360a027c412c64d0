package main

var (
	nbdkitMemory       = nbdkit("nbdkit", "memory")
	nbdkitMemorySingle = nbdkit("nbdkit -t 1", "memory", "1")
)

// structured is a server that clients ask for structured replies.
func structured(s server) server {
	s.structured = true
	return s
}

// suites lists all that is measured with loadgen, in the order of the table.
func suites() []suite {
	memory := []server{
		theFloor,
		nbdctlMemory("nbdctl", ours),
		nbdkitMemory,
		nbdkitMemorySingle,
		qemuNBD(),
		nbdServer(),
		goNBD("memory"),
	}
	file := []server{
		theFileFloor,
		nbdctlFile("nbdctl", "nbdctl", ours),
		nbdkit("nbdkit", "file"),
		nbdkit("nbdkit -t 1", "file", "1"),
		qemuNBD(),
		nbdServer(),
		goNBD("file"),
	}
	return []suite{
		{name: "memory", network: "unix", pinned: true, servers: memory,
			loads: []load{rr4kQ1, rr4k, rw4k, mix4k, rr4kK, rw4kK, rr128k, rw128k, sr1m, sw1m}},
		{name: "structured", network: "unix", pinned: true,
			servers: []server{nbdctlMemory("nbdctl", ours), nbdkitMemory, nbdkitMemorySingle, qemuNBD()},
			loads:   []load{rr4kX, rr128kX, er128kX}},
		{name: "forms", network: "unix", pinned: true,
			servers: []server{nbdctlMemory("simple", floor), structured(nbdctlMemory("structured", ours))},
			loads:   []load{rr4k, rr128k}},
		{name: "ledger", network: "unix", pinned: true,
			servers: []server{
				goServer("without", floor, []string{"-ledger", "off"}, "memory"),
				goServer("with", ours, []string{"-ledger", "on"}, "memory"),
			},
			loads: []load{rr4k, rw4k, rr4kK, rw4kK, rr4kQ1}},
		{name: "tls", network: "unix", pinned: true,
			servers: []server{
				overTLS(nbdctlMemory("nbdctl", ours), "--tls-certificates", folder),
				overTLS(nbdkitMemory, "--tls=require", "--tls-certificates="+folder),
				overTLS(nbdkitMemorySingle, "--tls=require", "--tls-certificates="+folder),
				overTLS(qemuNBD(), "--object", "tls-creds-x509,id=tls,endpoint=server,verify-peer=no,dir="+folder,
					"--tls-creds", "tls"),
				nbdServerOverTLS(),
			},
			loads: []load{rr4k, rw4k, rr128k, rw128k}},
		{name: "memory-unpinned", network: "unix", servers: memory,
			loads: []load{rr4k, rr128k, rr4kC4, rw4kC4, rr128kC4}},
		{name: "file", network: "unix", onDisk: true, pinned: true, servers: file,
			loads: []load{rr4k, rw4k, mix4k, rr128k, rw128k, sr1m, sw1m}},
		{name: "file-unpinned", network: "unix", onDisk: true, servers: file,
			loads: []load{sw1m}},
		{name: "tcp", network: "tcp", pinned: true,
			servers: []server{
				theFloor, nbdctlMemory("nbdctl", ours), nbdkitMemory, nbdkitMemorySingle, goNBD("memory"),
			},
			loads: []load{rr4k, rw4k, rr128k, rw128k}},
		{name: "sleep", network: "unix", pinned: true, waits: true,
			servers: []server{
				goServer("goroutines", floor, []string{"-goroutines"}, "sleep"),
				goServer("nbdctl", ours, nil, "sleep"),
			},
			loads: []load{rr4k, rw4k}},
		{name: "nanosleep-unpinned", network: "unix",
			servers: []server{
				goServer("goroutines", floor, []string{"-goroutines"}, "nanosleep"),
				goServer("nbdctl", ours, nil, "nanosleep"),
			},
			loads: []load{rr4k, rw4k}},
		{name: "plain", network: "unix", pinned: true,
			servers: []server{theFloor, goServer("nbdctl", ours, nil, "plain")},
			loads:   []load{rr4k, rw4k, sr1m, sw1m}},
		{name: "allocations", network: "unix", pinned: true, once: true, counts: true,
			servers: []server{goServer("nbdctl", ours, nil, "memory")},
			loads:   []load{rr4kQ1, rr4k, rw4k, rr128k, rw128k, sr1m, sw1m}},
		{name: "gogc", network: "unix", pinned: true,
			servers: []server{nbdctlMemory("GOGC=off", floor, "GOGC=off"), nbdctlMemory("GOGC=10", ours, "GOGC=10")},
			loads:   []load{rr4k, rw4k}},
		{name: "growth", network: "unix", once: true,
			servers: []server{theFloor, nbdctlMemory("nbdctl", ours), nbdkitMemorySingle},
			loads:   growth()},
	}
}

// baseSuites lists what a change of nbdctl could slow down, beside the programs of an earlier
// commit instead of those of others.
func baseSuites() []suite {
	return []suite{
		{name: "memory", network: "unix", pinned: true,
			servers: []server{theFloor, nbdctlMemory("nbdctl", ours), nbdctlBuilt("base-nbdctl", "base", variant)},
			loads:   []load{rr4k, rw4k, mix4k, rr4kQ1, rr128k, rw128k}},
		{name: "file", network: "unix", onDisk: true, pinned: true,
			servers: []server{
				theFileFloor,
				nbdctlFile("nbdctl", "nbdctl", ours),
				nbdctlFile("base-nbdctl", "base", variant),
			},
			loads: []load{rr4k, rw4k, rr128k, sr1m}},
		{name: "plain", network: "unix", pinned: true,
			servers: []server{
				theFloor,
				goServer("nbdctl", ours, nil, "plain"),
				goServerBuilt("base-goserver", "base", variant, nil, "plain"),
			},
			loads: []load{rr4k, rw4k}},
		{name: "allocations", network: "unix", pinned: true, once: true, counts: true,
			servers: []server{goServer("nbdctl", ours, nil, "memory")},
			loads:   []load{rr4kQ1, rr4k, rw4k, rr128k, rw128k}},
	}
}
