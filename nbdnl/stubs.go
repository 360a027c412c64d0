package nbdnl

import (
	"context"
	"errors"
)

type DetachOptions struct {
	Identifier string
	Any, Force bool
}
type Claimed struct{}

func (c *Client) Detach(ctx context.Context, index int, o DetachOptions) error {
	return errors.ErrUnsupported
}
func (c *Client) WaitFree(ctx context.Context, index int) error { return errors.ErrUnsupported }
func Holders(index int) ([]Holder, error)                       { return nil, errors.ErrUnsupported }
func Claim(ctx context.Context, index int) (*Claimed, error)    { return nil, errors.ErrUnsupported }
func (c *Claimed) Release() error                               { return nil }
