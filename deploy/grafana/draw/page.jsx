// The page that draw.mjs has Chromium draw: a dashboard's panels on their grid.

import 'uplot/dist/uPlot.min.css';
import { createRoot } from 'react-dom/client';
import {
  FieldType,
  ThemeContext,
  createTheme,
  dateTime,
  getDisplayProcessor,
  toDataFrame,
} from '@grafana/data';
import { BigValue, GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';

const { dashboard, from, to } = window.shown;
const theme = createTheme({ colors: { mode: 'dark' } });
const GRID = { width: 1600 / 24, height: 38, gap: 8 };

function nameOf(target, metric) {
  const legend = target.legendFormat;
  if (legend !== '__auto') return legend.replace(/{{(\w+)}}/g, (_, label) => metric[label]);
  return Object.values(metric).join(' ') || 'value';
}

// A frame for each series, its field configured as Grafana would configure it.
function framesOf(panel) {
  let number = 0;
  return panel.targets.flatMap((target) =>
    target.result.map(({ metric, values }) => {
      const name = nameOf(target, metric);
      const config = { ...panel.fieldConfig.defaults, displayName: name };
      for (const { matcher, properties } of panel.fieldConfig.overrides) {
        if (matcher.options !== name) continue;
        for (const { id, value } of properties) config[id] = value;
      }
      const frame = toDataFrame({
        fields: [
          { name: 'time', type: FieldType.time, values: values.map(([t]) => t * 1000) },
          { name, type: FieldType.number, values: values.map(([, v]) => finite(v)), config },
        ],
      });
      frame.fields.forEach((field) => {
        field.state = { seriesIndex: number };
        field.display = getDisplayProcessor({ field, theme, timeZone: 'utc' });
      });
      number += 1;
      return frame;
    })
  );
}

function finite(text) {
  const value = Number(text);
  return Number.isFinite(value) ? value : null;
}

function Stat({ panel, width, height }) {
  const [frame] = framesOf(panel);
  const config = panel.fieldConfig.defaults;
  const field = frame?.fields[1] ?? { type: FieldType.number, config, values: [] };
  const display = getDisplayProcessor({ field, theme });
  const last = [...field.values].reverse().find((value) => value !== null);
  const { colorMode, graphMode, textMode } = panel.options;
  const modes = { colorMode, graphMode, textMode };
  return <BigValue value={display(last ?? null)} {...modes} {...{ width, height, theme }} />;
}

function Curves({ panel, width, height }) {
  const frames = framesOf(panel);
  if (!frames.length) return <div style={{ padding: 8 }}>No data</div>;
  const range = { from: dateTime(from * 1000), to: dateTime(to * 1000) };
  return (
    <TimeSeries
      frames={frames}
      timeRange={{ ...range, raw: range }}
      timeZone="utc"
      legend={panel.options.legend}
      structureRev={1}
      {...{ width, height, theme }}
    />
  );
}

function Rows({ panel }) {
  const columns = panel.transformations[0].options.include.names;
  const words = panel.transformations[1].options.renameByName;
  const cell = { textAlign: 'left', padding: '4px 8px', fontSize: 13 };
  const rows = panel.targets[0].result.map(({ metric, value }) => ({ ...metric, Value: value[1] }));
  return (
    <table style={{ width: '100%', tableLayout: 'fixed' }}>
      <thead>
        <tr>{columns.map((name) => <th key={name} style={cell}>{words[name] ?? name}</th>)}</tr>
      </thead>
      <tbody>
        {rows.map((row, number) => (
          <tr key={number}>
            {columns.map((name) => (
              <td key={name} style={{ ...cell, overflow: 'hidden', textOverflow: 'ellipsis' }}>
                {row[name]}
              </td>
            ))}
          </tr>
        ))}
      </tbody>
    </table>
  );
}

const KINDS = { stat: Stat, timeseries: Curves, table: Rows };

function Panel({ panel }) {
  const { x, y, w, h } = panel.gridPos;
  const place = { position: 'absolute', left: x * GRID.width, top: y * GRID.height };
  if (panel.type === 'row') {
    return <div style={{ ...place, padding: '8px 4px', fontWeight: 500 }}>{panel.title}</div>;
  }
  const width = w * GRID.width - GRID.gap;
  const height = h * GRID.height - GRID.gap;
  const Kind = KINDS[panel.type];
  return (
    <div style={place}>
      <PanelChrome title={panel.title} {...{ width, height }}>
        {(innerWidth, innerHeight) => (
          <Kind panel={panel} width={innerWidth} height={innerHeight} />
        )}
      </PanelChrome>
    </div>
  );
}

createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <div style={{ position: 'relative', margin: 8 }}>
      {dashboard.panels.map((panel) => <Panel key={panel.id} panel={panel} />)}
    </div>
  </ThemeContext.Provider>
);
