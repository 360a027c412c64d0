package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// Attach starts a process of this program that goes on with the device of e, whose process has
// died, with the backend of spec. It returns the record of the process when it serves. The strings
// are warnings for the user. After an error the device waits as before. The process inherits the
// descriptor image, with its number, until it has opened the backend. A negative image is none.
func (e *Entry) Attach(ctx context.Context, spec Spec, image int) (*Record, []string, error) {
	l := legacy{apart: true}
	recordW, reportR, acceptW := l.reads(fileRecord), l.writes(fileReport), l.reads(fileAccept)
	var secretsW *os.File
	if len(spec.Secrets) != 0 {
		secretsW = l.reads(fileSecrets)
	}
	cmd, err := l.start(image)
	if err != nil {
		return nil, nil, err
	}
	defer reportR.Close()
	// With the end of this pipe it gives up, if it does not serve yet.
	stop := context.AfterFunc(ctx, func() { acceptW.Close() })
	defer func() { stop(); acceptW.Close() }()
	record := *e.Record
	record.Spec = spec
	err = errors.Join(json.NewEncoder(recordW).Encode(record), recordW.Close())
	if secretsW != nil {
		err = errors.Join(err, spec.Secrets.Send(secretsW), secretsW.Close())
	}
	told := listen(reportR)
	if err = errors.Join(err, told.err); err != nil {
		ended(cmd)
		return nil, told.warnings, err
	}
	return told.record, told.warnings, cmd.Process.Release()
}

// runAttached is the serving process that goes on after one that has died: it returns when the
// device has gone.
func runAttached(
	ctx context.Context, store *Store, files map[string]*os.File,
	open func(context.Context, Spec) (*Backing, error),
	inherit func(context.Context, Spec, Inheritance) (*Backing, error),
) error {
	var record Record
	err := json.NewDecoder(files[fileRecord]).Decode(&record)
	if err := errors.Join(err, files[fileRecord].Close(), nameProcess(serverName)); err != nil {
		return err
	}
	h := &Host{Store: store, Open: opener(files, open), Inherit: inherit}
	if files[fileKeeper] != nil {
		err = h.comeFrom(files[fileKeeper], &record)
	} else {
		record.Spec.Secrets, err = receiveSecrets(files)
	}
	if err != nil {
		return err
	}
	Publish()
	var stop func()
	h.Signals, stop = Signals()
	defer stop()
	starting, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	go func() { giveUp(accepted(starting, files[fileAccept])) }() // The starter never accepts: it goes.

	served := false
	h.Ready = func(_ context.Context, r Record, warnings []string) error {
		served = true
		return errors.Join(h.logFile.captureStderr(),
			report{Ready: &r, Warnings: warnings}.send(files[fileReport]))
	}
	err = h.Attach(ctx, starting, record)
	if served || err == nil {
		return err
	}
	return report{Error: err.Error(), Code: exit.Of(err)}.send(files[fileReport])
}

// opener is open that lets go of an image which was inherited: it has been opened anew, by its
// number. To keep it would do no harm.
func opener(
	files map[string]*os.File, open func(context.Context, Spec) (*Backing, error),
) func(context.Context, Spec) (*Backing, error) {
	return func(ctx context.Context, s Spec) (*Backing, error) {
		backing, err := open(ctx, s)
		_, _ = forgetStdin(), closeFile(files[fileImage])
		return backing, err
	}
}

// comeFrom receives what the keeper has of the device whose record is r.
func (h *Host) comeFrom(keeper *os.File, r *Record) error {
	c, err := unixConn(keeper)
	if err := errors.Join(err, keeper.Close()); err != nil {
		return err
	}
	w, err := receiveWill(c)
	if err == nil && (w.Estate == nil || w.Estate.UUID != r.UUID) {
		err = errors.New("the keeper has another device")
	}
	if err == nil {
		r.Spec.Secrets, err = w.Estate.secrets()
	}
	if err != nil {
		w.Estate.close()
		c.Close()
		return fmt.Errorf("keeper: %w", err)
	}
	h.inherited, h.keeperConn = w.Estate, c
	return nil
}
