//go:build !linux || 386 || arm || mips || mipsle

package memory

func newStore(size int64, b *budget) (store, error) { return newHeapStore(size, b) }
