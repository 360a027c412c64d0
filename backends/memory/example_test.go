package memory_test

import (
	"fmt"

	"github.com/nbdctl/nbdctl/backends/memory"
)

func Example() {
	m, err := memory.New(1<<40, memory.Options{}) // a terabyte, of nothing yet
	if err != nil {
		fmt.Println(err)
		return
	}
	defer m.Close()
	m.WriteAt([]byte("content"), 1<<39)
	fmt.Println(m.Used(), "bytes used of", m.Size())
	m.Trim(0, m.Size())
	fmt.Println(m.Used(), "bytes used of", m.Size())
	// Output:
	// 65536 bytes used of 1099511627776
	// 0 bytes used of 1099511627776
}
