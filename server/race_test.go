//go:build race

package server_test

// raceEnabled is true under the race detector, where sync.Pool forgets things at random, so
// allocations cannot be counted.
const raceEnabled = true
