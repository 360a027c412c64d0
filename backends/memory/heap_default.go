//go:build !linux || 386 || arm || mips || mipsle

package memory

func newStore(size int64, l *limit) (store, error) { return newHeapStore(size, l) }
