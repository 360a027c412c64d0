package server

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestBudget holds who gets memory: nobody beyond the bound but one alone, and nobody before those who have waited for longer.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var turns []int64
		b := newBudget(100, func(turn int64) { turns = append(turns, turn) })
		if !b.tryTake(60) || b.tryTake(41) || !b.tryTake(40) {
			t.Errorf("%d of 100 are used", b.used)
		}
		var got []string
		took := make(chan string)
		take := func(name string, bytes int64, c *Conn) {
			go func() {
				if !b.take(bytes, c) {
					name += " nothing"
				}
				took <- name
			}()
			synctest.Wait()
		}
		gone := new(Conn)
		take("all", 500, new(Conn))
		take("gone", 1, gone)
		take("little", 1, new(Conn))
		b.giveBack(60)
		gone.closed.Store(true)
		b.forget(gone)
		got = append(got, <-took)
		take("late", 1, gone)
		got = append(got, <-took)
		if b.tryTake(1) {
			t.Error("something was given to others than who waits")
		}
		time.Sleep(3*budgetTurn + time.Second)
		b.giveBack(40)
		got = append(got, <-took)
		time.Sleep(budgetTurn) // It is another one's turn to be the first.
		if b.used != 500 || len(b.queue) != 1 || b.tryTake(1) {
			t.Errorf("%d are used, %d wait", b.used, len(b.queue))
		}
		b.giveBack(500)
		got = append(got, <-took)
		if want := []string{"gone nothing", "late nothing", "all", "little"}; !slices.Equal(got, want) {
			t.Errorf("memory went to %v, want %v", got, want)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if want := []int64{2, 3}; !slices.Equal(turns, want) || b.used != 1 || !b.tryTake(99) {
			t.Errorf("in the end %d are used; turns %v, want %v", b.used, turns, want)
		}
	})
}
