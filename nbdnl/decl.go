package nbdnl

import (
	"context"
	"errors"
)

type Client struct{}
type Status struct {
	Index         int
	State         State
	Size          int64
	BlockSize     int
	ReadOnly      bool
	Identifier    string
	HasIdentifier bool
	OwnerTID      int
	OwnerPID      int
	Mode          Mode
}
type DetachOptions struct {
	Identifier string
	Any, Force bool
}
type Claimed struct{}

func New() (*Client, error)    { return nil, errors.ErrUnsupported }
func (c *Client) Close() error { return nil }
func (c *Client) Connect(ctx context.Context, cfg Config) (int, error) {
	return -1, errors.ErrUnsupported
}
func (c *Client) ConnectIndex(ctx context.Context, i int, cfg Config) error {
	return errors.ErrUnsupported
}
func (c *Client) Disconnect(ctx context.Context, index int, identifier string) error {
	return errors.ErrUnsupported
}
func (c *Client) DisconnectAny(ctx context.Context, index int) error { return errors.ErrUnsupported }
func (c *Client) Detach(ctx context.Context, index int, o DetachOptions) error {
	return errors.ErrUnsupported
}
func (c *Client) Reconfigure(ctx context.Context, index int, identifier string, u Update) error {
	return errors.ErrUnsupported
}
func (c *Client) Status(ctx context.Context, index int) (Status, error) {
	return Status{}, errors.ErrUnsupported
}
func (c *Client) Devices(ctx context.Context) ([]Status, error) { return nil, errors.ErrUnsupported }
func (c *Client) WaitFree(ctx context.Context, index int) error { return errors.ErrUnsupported }
func Holders(index int) ([]Holder, error)                       { return nil, errors.ErrUnsupported }
func Claim(ctx context.Context, index int) (*Claimed, error)    { return nil, errors.ErrUnsupported }
func (c *Claimed) Release() error                               { return nil }
