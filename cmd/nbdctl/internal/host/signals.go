package host

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
)

// Heeded returns those of the signals that the process may take over. A signal that was
// ignored when the process started is not among them: nohup, and a shell that starts a
// command in the background, ignore the signals of a terminal for it. The Go runtime
// leaves such a signal ignored until signal.Notify (os/signal, "Default behavior of
// signals in Go programs"), and so do programs that are executed. SIGTERM is always among
// them: nobody ignores it so, and the runtime has taken it over already.
func Heeded(signals ...os.Signal) []os.Signal {
	return slices.DeleteFunc(signals, func(s os.Signal) bool { return s != syscall.SIGTERM && signal.Ignored(s) })
}

// withSignals is a context that the next signal ends, with the signal in its
// cause. The returned function leaves signals to others from then on, and
// returns the one that came, if any; it may be called again.
func withSignals(ctx context.Context, signals <-chan os.Signal) (context.Context, func() os.Signal) {
	ctx, cancel := context.WithCancelCause(ctx)
	finished := make(chan struct{})
	var came os.Signal
	go func() {
		defer close(finished)
		select {
		case came = <-signals:
			cancel(fmt.Errorf("interrupted by %s", came))
		case <-ctx.Done():
		}
	}()
	return ctx, func() os.Signal {
		cancel(context.Canceled)
		<-finished
		return came
	}
}
