package memory

import (
	"fmt"
	"io/fs"
	"os"
)

// Files returns copies of the descriptors of the files that hold the device, for another process to
// go on with it (Inherit). They are the caller's. Only one process may use the device at a time:
// who hands it over lets no request be made any more, and ends with Leave in place of Close. The
// error matches errors.ErrUnsupported where the device is not in such files, as on other systems
// than Linux.
func (m *Memory) Files() ([]*os.File, error) {
	if m.closed.Load() {
		return nil, fs.ErrClosed
	}
	files, err := m.store.files()
	if err != nil {
		return nil, fmt.Errorf("memory: hand over: %w", err)
	}
	return files, nil
}

// Leave is Close, but leaves the content to who has it by Files.
func (m *Memory) Leave() error {
	if m.closed.Swap(true) {
		return fs.ErrClosed
	}
	return m.store.leave()
}

// Inherit makes a device of the files of another one, of size bytes, which its process does not use
// any more. They belong to the Memory from then on, and are closed in case of an error. What holds
// content counts towards Options.Limit, also if that is exceeded by it.
func Inherit(size int64, files []*os.File, opts Options) (*Memory, error) {
	err := check(size, opts)
	var s store
	if err == nil {
		s, err = inheritStore(size, newLimit(opts.Limit), files)
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, fmt.Errorf("memory: device of %d bytes, from another process: %w", size, err)
	}
	return newMemory(size, s), nil
}
