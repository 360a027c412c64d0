package server

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestBudget holds who gets memory: nobody beyond the bound but one alone, and nobody before those who wait.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		starved := 0
		b := newBudget(100, func() { starved++ })
		if !b.tryTake(60) || b.tryTake(41) || !b.tryTake(40) {
			t.Errorf("%d of 100 are used", b.used)
		}
		took := make(chan bool, 1)
		go func() { b.take(500); took <- true }()
		synctest.Wait()
		b.giveBack(60)
		synctest.Wait()
		if len(took) > 0 || b.tryTake(1) {
			t.Error("something was given to others than who waits, or beyond the bound")
		}
		time.Sleep(2*hoardPatience + time.Second)
		if starved != 2 {
			t.Errorf("starvation was told %d times, want 2", starved)
		}
		b.giveBack(40)
		<-took
		if b.used != 500 || b.waiting != 0 || b.tryTake(1) {
			t.Errorf("%d are used, %d wait", b.used, b.waiting)
		}
		b.giveBack(500)
		time.Sleep(time.Hour)
		if starved != 2 || b.used != 0 || !b.tryTake(100) {
			t.Errorf("in the end %d are used, starvation was told %d times", b.used, starved)
		}
	})
}
