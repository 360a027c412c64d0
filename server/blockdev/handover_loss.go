package blockdev

import (
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
)

// A HandedLoss is a LossError as it is written down. Of errors the text is left.
type HandedLoss struct {
	Number    uint64         `json:"number"`
	Failed    *HandedFailure `json:"failed,omitempty"`
	Unsent    string         `json:"unsent,omitempty"`
	Unwritten string         `json:"unwritten,omitempty"`
}

// A HandedFailure is a server.LossError as it is written down.
type HandedFailure struct {
	Requests uint64              `json:"requests"`
	First    server.RequestError `json:"first"` // without Err
	Error    string              `json:"error"`
}

func (e *LossError) hand() *HandedLoss {
	if e == nil {
		return nil
	}
	h := &HandedLoss{Number: e.Number}
	if e.Failed != nil {
		h.Failed = &HandedFailure{Requests: e.Failed.Requests, First: *e.Failed.First}
		h.Failed.First.Err, h.Failed.Error = nil, e.Failed.First.Err.Error()
	}
	if e.Unsent != nil {
		h.Unsent = e.Unsent.Error()
	}
	if e.Unwritten != nil {
		h.Unwritten = e.Unwritten.Error()
	}
	return h
}

func (h *HandedLoss) loss() *LossError {
	if h == nil {
		return nil
	}
	e := &LossError{Number: h.Number, index: -1}
	if h.Failed != nil {
		first := h.Failed.First
		first.Err = &toldError{h.Failed.Error, nil}
		e.Failed = &server.LossError{Requests: h.Failed.Requests, First: &first}
	}
	if h.Unsent != "" {
		e.Unsent = &toldError{h.Unsent, nil}
	}
	if h.Unwritten != "" {
		e.Unwritten = &toldError{h.Unwritten, nbdnl.ErrNotWritten}
	}
	return e
}

// A toldError is an error that was written down.
type toldError struct {
	text string
	is   error // what it matches; nil: nothing
}

func (e *toldError) Error() string { return e.text }

func (e *toldError) Unwrap() error { return e.is }
