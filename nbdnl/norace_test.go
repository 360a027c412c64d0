//go:build !race

package nbdnl_test

// raceDetector is whether the race detector slows the tests down.
const raceDetector = false
