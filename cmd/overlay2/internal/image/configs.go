package image

import "fmt"

// configs holds the configs of a source, each once: its images may be many of few configs.
type configs struct {
	byName map[string]*parsed
	size   int64
}

// get returns the config of this name, which read reads.
func (c *configs) get(name string, read func() ([]byte, error)) (*parsed, error) {
	if p := c.byName[name]; p != nil {
		return p, nil
	}
	raw, err := read()
	if err != nil {
		return nil, err
	}
	if c.size += int64(len(raw)); c.size > maxConfigs {
		return nil, fmt.Errorf("%w: configs of more than %d bytes together", ErrInvalid, maxConfigs)
	}
	p, err := parseConfig(raw)
	if err != nil {
		return nil, err
	}
	if c.byName == nil {
		c.byName = map[string]*parsed{}
	}
	c.byName[name] = p
	return p, nil
}

// tooMany is the error of a source with more than maxImages images.
func tooMany(n int) error {
	if n <= maxImages {
		return nil
	}
	return fmt.Errorf("%w: more than %d images in one source", ErrInvalid, maxImages)
}
