package server

import (
	"errors"
	"net"
	"slices"
	"testing"
	"time"
)

// A deadlines is a socket that only has a read deadline.
type deadlines struct {
	net.Conn
	interrupted bool
	err         error
}

func (d *deadlines) SetReadDeadline(t time.Time) error {
	d.interrupted = !t.IsZero()
	return d.err
}

// TestControl has what a loop is told, after each sequence of commands, and what becomes of the
// read deadline.
func TestControl(t *testing.T) {
	const (
		begin, end            = "begin", "end"
		stop, quiesce, giveUp = "stop", "quiesce", "giveUp"
		told, resume          = "told", "resume"
	)
	for _, tt := range []struct {
		name        string
		steps       []string
		goesOn      bool // what the last told or resume said
		interrupted bool
	}{
		{name: "nothing", steps: []string{begin, told}},
		{name: "stop", steps: []string{begin, stop, told}, interrupted: true},
		{name: "stop before it begins", steps: []string{stop}},
		{name: "stop when it is over", steps: []string{begin, end, stop}},
		{name: "stopped", steps: []string{begin, stop, told, end}},
		{name: "quiesce", steps: []string{begin, quiesce, told}, goesOn: true, interrupted: true},
		{name: "quiesce, done", steps: []string{begin, quiesce, told, resume}, goesOn: true},
		{name: "quiesce before it begins", steps: []string{quiesce, begin, told}},
		{name: "quiesce twice", steps: []string{begin, quiesce, told, quiesce, resume}, goesOn: true,
			interrupted: true},
		{name: "quiesce twice, done", steps: []string{begin, quiesce, told, quiesce, resume, told, resume},
			goesOn: true},
		{name: "stop in a quiescence", steps: []string{begin, quiesce, told, stop, resume}, interrupted: true},
		{name: "end in a quiescence", steps: []string{begin, quiesce, end}},
		{name: "give up", steps: []string{begin, giveUp, told}, goesOn: true, interrupted: true},
		{name: "give up, done", steps: []string{begin, giveUp, told, resume}, goesOn: true},
		{name: "give up, and quiesce meanwhile", steps: []string{begin, giveUp, told, quiesce, resume}, goesOn: true,
			interrupted: true},
		{name: "give up in a quiescence", steps: []string{begin, quiesce, told, giveUp, resume}, goesOn: true},
		{name: "give up and stop", steps: []string{begin, giveUp, stop, told, resume}, interrupted: true},
		{name: "end after it gave up", steps: []string{begin, giveUp, end}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nc := &deadlines{}
			k := control{nc: nc}
			var q *quiescence
			goesOn := false
			for _, step := range tt.steps {
				switch step {
				case begin:
					if err := k.begin(); err != nil {
						t.Fatal(err)
					}
				case stop:
					if err := k.stop(); err != nil {
						t.Fatal(err)
					}
				case quiesce:
					k.quiesce(nil)
				case giveUp:
					k.giveUp()
				case told:
					q, goesOn = k.told()
				case resume:
					goesOn = k.resume(q)
				case end:
					k.end()
				}
			}
			if goesOn != tt.goesOn || nc.interrupted != tt.interrupted {
				t.Errorf("goes on: %t, want %t; reads are interrupted: %t, want %t",
					goesOn, tt.goesOn, nc.interrupted, tt.interrupted)
			}
		})
	}
}

// TestControlBegins has a connection begin once, or never.
func TestControlBegins(t *testing.T) {
	k := control{nc: &deadlines{}}
	if k.serving() {
		t.Error("serving before it began")
	}
	if err := k.begin(); err != nil {
		t.Fatal(err)
	}
	if !k.serving() || k.preclude() {
		t.Error("it is not serving, or could be kept from it, after it began")
	}
	if err := k.begin(); err == nil {
		t.Error("began twice")
	}
	k.end()
	if k.serving() || k.quiesce(nil) != nil {
		t.Error("serving after its end")
	}
	never := control{nc: &deadlines{}}
	if got := []bool{never.preclude(), never.preclude()}; !slices.Equal(got, []bool{true, false}) {
		t.Errorf("kept from beginning: %t, want once", got)
	}
	if err := never.begin(); !errors.Is(err, ErrShutdown) {
		t.Errorf("begin: %v, want %v", err, ErrShutdown)
	}
	broken := control{nc: &deadlines{err: net.ErrClosed}, phase: phaseServing}
	if err := broken.stop(); !errors.Is(err, net.ErrClosed) || !broken.stopping.Load() {
		t.Errorf("stop with a socket that fails: %v, stopping: %t", err, broken.stopping.Load())
	}
}
