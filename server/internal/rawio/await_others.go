//go:build !linux

package rawio

// await lets the call that receives wait.
func (c *portable) await(l Lender) error {
	l.Park(false)
	return nil
}
