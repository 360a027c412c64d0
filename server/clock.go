package server

import (
	"time"

	"github.com/nbdctl/nbdctl/server/internal/monotonic"
)

func clock() time.Duration { return monotonic.Now() }
