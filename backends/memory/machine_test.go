package memory

import (
	"maps"
	"runtime"
	"testing"
	"testing/fstest"
)

const gib = 1 << 30

func TestSpare(t *testing.T) {
	type files map[string]string
	meminfo := files{"proc/meminfo": "MemTotal:       8388608 kB\nMemFree:  100 kB\nMemAvailable:    4194304 kB\n"}
	const machineSpare = 4*gib - gib/2
	for _, tt := range []struct {
		name  string
		files files
		want  int64
		ok    bool
	}{
		{"no proc", nil, 0, false},
		{"no MemAvailable", files{"proc/meminfo": "MemTotal: 8388608 kB\n"}, 0, false},
		{"foreign bytes", files{"proc/meminfo": "MemTotal: x kB\nMemAvailable: 99999999999999999999 kB\n"}, 0, false},
		{"machine alone", meminfo, machineSpare, true},
		{"small machine", files{
			"proc/meminfo": "MemTotal: 262144 kB\nMemAvailable: 131072 kB\n",
		}, 128<<20 - 32<<20, true},
		{"large machine", files{
			"proc/meminfo": "MemTotal: 1073741824 kB\nMemAvailable: 1073741824 kB\n",
		}, 1024*gib - gib, true},
		{"full machine", files{
			"proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 1024 kB\n",
		}, 1<<20 - gib/2, true},
		{"version 1 only", with(meminfo, files{"proc/self/cgroup": "4:memory:/a\n"}), machineSpare, true},
		{"no limits", with(meminfo, files{
			"proc/self/cgroup":                 "0::/a/b\n",
			"sys/fs/cgroup/a/b/memory.max":     "max\n",
			"sys/fs/cgroup/a/b/memory.high":    "max\n",
			"sys/fs/cgroup/a/b/memory.current": "1073741824\n",
		}), machineSpare, true},
		{"max", with(meminfo, files{
			"proc/self/cgroup":                 "1:cpu:/x\n0::/a/b\n",
			"sys/fs/cgroup/a/b/memory.max":     "2147483648\n",
			"sys/fs/cgroup/a/b/memory.high":    "max\n",
			"sys/fs/cgroup/a/b/memory.current": "1073741824\n",
		}), gib - 128<<20, true},
		{"high is lower", with(meminfo, files{
			"proc/self/cgroup":                 "0::/a/b\n",
			"sys/fs/cgroup/a/b/memory.max":     "2147483648\n",
			"sys/fs/cgroup/a/b/memory.high":    "1073741824\n",
			"sys/fs/cgroup/a/b/memory.current": "536870912\n",
		}), 512<<20 - 64<<20, true},
		{"page cache makes room", with(meminfo, files{
			"proc/self/cgroup":               "0::/a\n",
			"sys/fs/cgroup/a/memory.max":     "1073741824\n",
			"sys/fs/cgroup/a/memory.current": "1073741824\n",
			"sys/fs/cgroup/a/memory.stat": "anon 1\nactive_file 268435456\n" +
				"inactive_file 134217728\nslab_reclaimable 134217728\n",
		}), 512<<20 - 64<<20, true},
		{"the parent's limit", with(meminfo, files{
			"proc/self/cgroup":                 "0::/a/b\n",
			"sys/fs/cgroup/a/memory.max":       "1073741824\n",
			"sys/fs/cgroup/a/memory.current":   "0\n",
			"sys/fs/cgroup/a/b/memory.max":     "2147483648\n",
			"sys/fs/cgroup/a/b/memory.current": "0\n",
		}), gib - 64<<20, true},
		{"a container's root", with(meminfo, files{ // its path is that of the host
			"proc/self/cgroup":             "0::/kubepods/pod/1\n",
			"sys/fs/cgroup/memory.max":     "1073741824\n",
			"sys/fs/cgroup/memory.current": "0\n",
		}), gib - 64<<20, true},
		{"outside of the namespace", with(meminfo, files{"proc/self/cgroup": "0::/../../b\n"}), machineSpare, true},
		{"more used than allowed", with(meminfo, files{
			"proc/self/cgroup":               "0::/a\n",
			"sys/fs/cgroup/a/memory.max":     "1073741824\n",
			"sys/fs/cgroup/a/memory.current": "2147483648\n",
		}), -gib - 64<<20, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := fstest.MapFS{}
			for name, content := range tt.files {
				root[name] = &fstest.MapFile{Data: []byte(content)}
			}
			if got, ok := (machine{root}).spare(); got != tt.want || ok != tt.ok {
				t.Errorf("%d, %v; want %d, %v", got, ok, tt.want, tt.ok)
			}
		})
	}
}

func with(a, b map[string]string) map[string]string {
	c := maps.Clone(a)
	maps.Copy(c, b)
	return c
}

func TestSpareOfThisMachine(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no /proc")
	}
	if got, ok := hostMachine().spare(); !ok || got > 1<<50 {
		t.Errorf("%d, %v", got, ok)
	}
}

func FuzzSpare(f *testing.F) {
	f.Add("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n", "0::/a\n", "1073741824\n", "active_file 5\n")
	f.Add("MemTotal:\nMemAvailable: -1 kB", "0::", "max", "")
	f.Add("MemTotal: 9007199254740991 kB\nMemAvailable: 9007199254740991 kB\n",
		"0::/../x\n0::/y", "9223372036854775807", "active_file 9007199254740991")
	f.Fuzz(func(t *testing.T, meminfo, cgroup, number, stat string) {
		root := fstest.MapFS{
			"proc/meminfo":                   {Data: []byte(meminfo)},
			"proc/self/cgroup":               {Data: []byte(cgroup)},
			"sys/fs/cgroup/a/memory.max":     {Data: []byte(number)},
			"sys/fs/cgroup/a/memory.current": {Data: []byte(number)},
			"sys/fs/cgroup/a/memory.stat":    {Data: []byte(stat)},
		}
		if n, ok := (machine{root}).spare(); ok && n > maxSize {
			t.Errorf("%d bytes to spare", n)
		}
	})
}
