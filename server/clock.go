package server

import "time"

// epoch is what the clock counts from. Nothing depends on when it was.
var epoch = time.Now()

// clock reads the monotonic clock, for about half the price of time.Now. It is the time since the epoch. Only the difference of two
// readings means anything.
func clock() time.Duration { return time.Since(epoch) }
