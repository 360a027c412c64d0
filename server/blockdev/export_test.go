package blockdev

import "context"

// End is what Close does, within the time that ctx leaves.
func (d *Device) End(ctx context.Context) error { return d.end(ctx) }
